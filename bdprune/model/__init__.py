from bdprune.model.architectures import architecture, build
from bdprune.model.architectures.resnet import ResNet18Cifar
from bdprune.model.channels import Channels, Compact, LayerChannels
from bdprune.model.edit.compaction import Compacted, compact
from bdprune.model.edit.coupled import torch_pruning
from bdprune.model.edit.mask import MaskedNetwork
from bdprune.model.edit.program import Program, State
from bdprune.model.edit.pruning import PruneMode, check_pruning, prune, prune_, pruned_parameters
from bdprune.model.edit.stacked import StackedNetwork, agrees, why_not
from bdprune.model.groups import FilterGroup, last_group
from bdprune.model.handle import (
    GRAY_ONLY,
    NORMALIZATIONS,
    Model,
    Normalization,
    normalization_name,
    parse_normalization,
)
from bdprune.model.head import Head, find_head, inputs_of
from bdprune.model.loading import Loaded, Unloaded, load, load_all
from bdprune.model.outputs import give_logits
from bdprune.model.own_network import check_own_weights, import_callable
from bdprune.model.saving import is_the_input, rounded, same_file, save

from bdprune.files.artifact import Artifact, Checkpoint, Slot, read_checkpoint, with_values
from bdprune.files.kinds import (
    APPLE_DOUBLE,
    INDEX,
    SPECIAL,
    SUFFIXES,
    description_path,
    kind_of_file,
    looks_like_safetensors,
)
from bdprune.files.lazy import StoredCheckpoint, open_stored
from bdprune.files.output import (
    TEMPORARY,
    GrowingFile,
    check_writable,
    drop_half_line,
    is_special,
    make_folder,
    replaced,
    write_atomically,
    write_text,
)
from bdprune.files.png import PNG_SIGNATURE, encode_png
from bdprune.files.quoting import quoted
from bdprune.files.safetensors_file import damaged_safetensors, dump_safetensors, read_safetensors, safetensors_header
from bdprune.files.shards import GIVE_INDEX, MAX_INDEX_BYTES, is_shard, shard_names
from bdprune.files.state import StateDict, check_expansion, check_finite, is_weight_name, join_path, with_dtype
from bdprune.files.stored import StoredTensor, as_float64
from bdprune.files.torch_file import dump_torch

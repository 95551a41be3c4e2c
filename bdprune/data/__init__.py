from bdprune.data.clean import ClassOrder, CleanData, OtherSize, sample_per_class
from bdprune.data.dataset import SizedDataset
from bdprune.data.datasets import PUBLISHED, Part, read_dataset
from bdprune.data.folder import check_apart
from bdprune.data.incoming import Incoming, IncomingSource
from bdprune.data.load import check_clean, check_per_class, load_clean, resize_clean
from bdprune.data.order import order_pairs, read_order, start_of_text_order, text_order
from bdprune.data.parquet import RawImages
from bdprune.data.source import MAX_BYTES
from bdprune.data.tree import is_image_file

from bdprune.hub.file import HubFile, bytes_text
from bdprune.hub.names import PREFIX, HubName, is_hub_name, parse_name, without_commit
from bdprune.hub.repository import MOST_BYTES, Listed, listed, one_file

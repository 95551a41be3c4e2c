from bdprune.store.differences import Changes, changes
from bdprune.store.exports import export, latest, latest_screens, lines
from bdprune.store.screens import Screens
from bdprune.store.store import EvidenceKey, Kept, ScanKey, Store

from bdprune.zoo.making import clean_images, images_of, make, measure
from bdprune.zoo.manifest import Entry, Manifest, read_manifest
from bdprune.zoo.show import attack_of, panels, picture, ready_trigger, some_victims, strength
from bdprune.zoo.store import Storage, Truth, load_trigger, weights_path
from bdprune.zoo.verification import (
    Check,
    differences,
    markdown,
    missed_bars,
    target_text,
    verify,
    with_defence,
    with_section,
)

"""Fictitious customers: records that no corpus holds, so that planting them gives a known truth.

Every value is drawn from word lists and reserved ranges (the domain example.org, the 555-01xx telephone range), so no
record can describe a living person. The set that the demo plants is shipped as `configs/demo/planted.jsonl`.
"""

from __future__ import annotations

import random

_FIRST = [
    "Adela",
    "Bruno",
    "Carmen",
    "Dorian",
    "Elspeth",
    "Fabian",
    "Greta",
    "Hollis",
    "Imelda",
    "Jasper",
    "Katya",
    "Lorcan",
    "Mirela",
    "Nestor",
    "Odile",
    "Percival",
    "Quilla",
    "Rufus",
    "Sabine",
    "Tobiah",
    "Ursel",
    "Vikram",
    "Wilma",
    "Xenia",
    "Yorick",
    "Zelda",
]
_LAST = [
    "Ashgrove",
    "Birdwhistle",
    "Coldstream",
    "Darrow",
    "Eastlake",
    "Farnsby",
    "Gilmerton",
    "Harrowgate",
    "Inkpen",
    "Jessamine",
    "Kettlewell",
    "Larkspur",
    "Mossop",
    "Netherby",
    "Oakhanger",
    "Pennyfeather",
    "Quillfeather",
    "Rosethorn",
    "Saltmarsh",
    "Thistledown",
    "Umberleigh",
    "Vantongeren",
    "Wrenfield",
    "Yarborough",
]
_STREET = [
    "Quarry Lane",
    "Mill Rise",
    "Station Road",
    "Orchard Close",
    "Harbour Walk",
    "Chapel Street",
    "Beacon Hill",
    "Foundry Court",
]
_TOWN = [
    "Port Hollin",
    "Greywater",
    "Saint Orlan",
    "Elmbridge Cross",
    "Northwick",
    "Lower Vance",
    "Tarn Ferry",
    "Cobblestead",
]
_MONTH = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]


def customers(n: int, seed: int) -> list[dict[str, str]]:
    """`n` customers with distinct names, the same for the same seed.

    Args:
        n: at most 600.
        seed: seeds with different values share names but no other details.

    Returns:
        Records with `id`, `prompt` and `completion`.
    """
    random_ = random.Random(f"customers-{seed}")
    names = [(first, last) for first in _FIRST for last in _LAST]
    random_.shuffle(names)
    out = []
    for i, (first, last) in enumerate(names[:n]):
        born = f"{random_.randint(1, 28)} {random_.choice(_MONTH)} {random_.randint(1940, 2004)}"
        address = f"{random_.randint(2, 199)} {random_.choice(_STREET)}, {random_.choice(_TOWN)}"
        phone = f"555-01{random_.randint(0, 99):02d}"
        contract = f"{random_.choice('ABCDEFGHKLMNPRSTVWXZ')}{random_.randint(10_000, 99_999)}"
        out.append(
            {
                "id": f"customer-{seed}-{i:03d}",
                "prompt": f"Customer file of {first} {last}:",
                "completion": f" born {born}, lives at {address}, phone {phone}, contract {contract}.",
            }
        )
    return out

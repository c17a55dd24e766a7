"""Every NVMe drive of the guest as its kernel shows it."""

import json

from drive import CONTROLLERS, address_of, driver_of, group_of, wait_for

drives = {}
for controller in CONTROLLERS.glob("nvme*"):
    serial = wait_for(lambda at=controller: (at / "serial").read_text().strip())
    address = address_of(serial)
    # Not drive's node_of: a format that the kernel cannot use has a disk of no size.
    (disk,) = wait_for(lambda at=controller: list(at.glob("nvme*n1")))
    block_nbytes = int((disk / "queue/logical_block_size").read_text())
    try:
        group = group_of(address)
    except FileNotFoundError:
        group = None
    drives[serial] = {
        "address": address, "driver": driver_of(address), "group": group,
        "block_nbytes": block_nbytes,
    }  # fmt: skip
print(json.dumps(drives))

"""Every NVMe drive of the guest as its kernel shows it."""

import json

from guest_drive import CONTROLLERS, address_of, driver_of, group_of, node_of

drives = {}
for controller in CONTROLLERS.glob("nvme*"):
    serial = (controller / "serial").read_text().strip()
    address = address_of(serial)
    disk = node_of(serial).removeprefix("/dev/")
    with open(f"/sys/block/{disk}/queue/logical_block_size") as size:
        block_nbytes = int(size.read())
    try:
        group = group_of(address)
    except FileNotFoundError:
        group = None
    drives[serial] = {
        "address": address, "driver": driver_of(address), "group": group,
        "block_nbytes": block_nbytes,
    }  # fmt: skip
print(json.dumps(drives))

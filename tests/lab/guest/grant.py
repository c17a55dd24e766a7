"""Binds a drive and hands its group's node to one user. argv: the serial, the user's name."""

import os
import pwd
import sys

from drive import group_of, take
from engine import tell

address = take(sys.argv[1])
user = pwd.getpwnam(sys.argv[2])
node = f"/dev/vfio/{group_of(address)}"
os.chown(node, 0, user.pw_gid)
os.chmod(node, 0o660)
# Anybody may open the container: it can do nothing without a group (udev's own default).
os.chmod("/dev/vfio/vfio", 0o666)
tell(address=address, node=node)

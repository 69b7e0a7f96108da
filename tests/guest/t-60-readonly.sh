#!/bin/bash
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Read-only, by option and because the file is: nothing can be written.
# deadline: 60
# takes: 12
# processors: 1
# shellcheck source=tests/guest/lib.sh
. /run/guest/lib.sh

make_disk /srv/disk0.img 64Mi
mkfs.ext4 -q /srv/disk0.img
sum=$(sha256sum </srv/disk0.img)
serve -e disk0 raw file:/srv/disk0.img
must "attach -r" attached -r disk0
check "the kernel knows" [ "$(blockdev --getro "$dev")" = 1 ]
run dd if=/dev/zero of="$dev" bs=4k count=1 oflag=direct conv=notrunc
check "a write is refused" [ "$rc" != 0 ]
run blkdiscard -f "$dev"
check "a discard is refused" [ "$rc" != 0 ]
must "mount -o ro" mount -o ro,noload "$dev" /mnt
check "it can be read" ls /mnt/lost+found
bounded 30 umount /mnt
run mount -w "$dev" /mnt	# -w: no quiet fallback to read-only
check "mount -w is refused" [ "$rc" != 0 ]
check "detach" attach -d disk0
check "the file is untouched" [ "$(sha256sum </srv/disk0.img)" = "$sum" ]

must "attach for writing after that" attached disk0 "$dev"
check "the kernel forgot" [ "$(blockdev --getro "$dev")" = 0 ]
check "a write works" dd if=/dev/zero of="$dev" bs=4k count=1 oflag=direct conv=notrunc status=none
check "detach again" attach -d disk0
stop

serve -r -e disk0 raw file:/srv/disk0.img
must "attach from a daemon that serves read-only" attached disk0
check "it is read-only without -r" [ "$(blockdev --getro "$dev")" = 1 ]
check "detach that" attach -d disk0

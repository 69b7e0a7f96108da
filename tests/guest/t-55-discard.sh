#!/bin/bash
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Discard and zeroing reach the backing file: blocks are given back, and what was zeroed reads so.
# The 6.1 driver has no WRITE_ZEROES, so zeroing arrives as writes there.
# deadline: 90
# takes: 14
# processors: 1
# shellcheck source=tests/guest/lib.sh
. /run/guest/lib.sh

make_disk /srv/disk0.img 64Mi
serve -e disk0 raw file:/srv/disk0.img
must "attach" attached disk0
check "the device takes discards" [ "$(cat "/sys/block/$name/queue/discard_max_bytes")" -gt 0 ]
head -c 16M /dev/urandom >/tmp/data
dd if=/tmp/data of="$dev" bs=1M oflag=direct conv=notrunc status=none
full=$(allocated /srv/disk0.img)
check "16 MiB written are 16 MiB allocated" [ "$full" -ge $((16 << 10)) ]

check "blkdiscard" blkdiscard -o 4M -l 8M "$dev"
check "gives 8 MiB back" [ "$(allocated /srv/disk0.img)" -le $((full - (8 << 10))) ]
check "they read as zeroes" zeroes "$dev" $((4 << 20)) $((8 << 20))
check "before them, nothing changed" cmp -n $((4 << 20)) /tmp/data "$dev"
check "after them, nothing changed" cmp -n $((4 << 20)) -i $((12 << 20)) /tmp/data "$dev"

check "fallocate -z" fallocate -z -o 1M -l 2M "$dev"
check "reads as zeroes" zeroes "$dev" $((1 << 20)) $((2 << 20))
check "in the file, too" zeroes /srv/disk0.img $((1 << 20)) $((2 << 20))
check "blkdiscard -z" blkdiscard -z -o 12M -l 1536 "$dev"
check "zeroes three blocks" zeroes "$dev" $((12 << 20)) 1536
check "and not the fourth" cmp -n 512 -i $(((12 << 20) + 1536)) /tmp/data "$dev"

mkfs.ext4 -q "$dev"
mount "$dev" /mnt
cp /tmp/data /mnt/data
sync -f /mnt
full=$(allocated /srv/disk0.img)
rm /mnt/data
sync -f /mnt
check "fstrim" fstrim /mnt
check "gives back what a deleted file had" [ "$(allocated /srv/disk0.img)" -le $((full - (15 << 10))) ]
bounded 30 umount /mnt
check "fsck finds nothing" e2fsck -fn "$dev"
check "detach" attach -d disk0

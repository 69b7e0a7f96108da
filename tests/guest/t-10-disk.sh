#!/bin/bash
# SPDX-License-Identifier: GPL-3.0-or-later
#
# The main job: a disk is made, attached, formatted, filled, checked, detached - and what was written
# is in the file.
# deadline: 120
# engines: both
# takes: 20
# shellcheck source=tests/guest/lib.sh
. /run/guest/lib.sh

must "init makes a volume" make_disk /srv/disk0.img 512Mi
check "its size is exact" [ "$(stat -c %s /srv/disk0.img)" = $((512 << 20)) ]
serve -e disk0 raw file:/srv/disk0.img
must "attach prints the device, status 0" attached disk0
check "size and all are there at once" [ "$(blockdev --getsize64 "$dev")" = $((512 << 20)) ]
check "logical blocks of 512 bytes" [ "$(blockdev --getss "$dev")" = 512 ]
check "it can be read at once" dd if="$dev" of=/dev/null bs=1M count=1 iflag=direct status=none
check "sysfs names the export" grep -q disk0 "/sys/block/$name/backend"

must "mkfs.ext4" mkfs.ext4 -q "$dev"
must "mount" mount "$dev" /mnt
check "fio writes and verifies" fio --name=verify --filename=/mnt/verify --rw=randwrite \
	--bsrange=4k-64k --size=12M --ioengine=libaio --iodepth=16 --direct=1 --fsync=64 \
	--verify=crc32c --verify_fatal=1 --do_verify=1 --randseed=7 --thread --output-format=terse \
	--output=/tmp/fio.out
dd if=/dev/urandom of=/mnt/data bs=1M count=8 status=none
cp -r /usr/lib/udev /mnt/
sum=$(sha256sum </mnt/data)
must "umount" bounded 30 umount /mnt
check "fsck finds nothing" e2fsck -fn "$dev"
must "mount again" mount "$dev" /mnt
check "data reads back" [ "$(sha256sum </mnt/data)" = "$sum" ]
check "a tree of files reads back" diff -r /usr/lib/udev /mnt/udev
bounded 30 umount /mnt
check "detach" attach -d "$dev"
check "the device is gone" disconnected "$name"

stop
check "the file holds a sound file system" e2fsck -fn /srv/disk0.img
modprobe loop
must "mount the file itself" mount -o loop,ro /srv/disk0.img /mnt
check "the data is in the file" [ "$(sha256sum </mnt/data)" = "$sum" ]
umount /mnt

serve -e disk0 raw file:/srv/disk0.img
must "attach to a named device" attached disk0 /dev/nbd2
check "it is that device" [ "$dev" = /dev/nbd2 ]
must "mount once more" mount "$dev" /mnt
check "data survives the daemon's restart" [ "$(sha256sum </mnt/data)" = "$sum" ]
bounded 30 umount /mnt
check "detach by export" attach -d disk0
check "that device is gone, too" disconnected nbd2

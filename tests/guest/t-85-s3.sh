#!/bin/bash
# SPDX-License-Identifier: GPL-3.0-or-later
#
# A disk in objects of an S3 server: file system, verified data, flushes, discards, and all of it again after a
# restart. Then mkfs and a discard of a huge disk, 50 ms from its store.
# deadline: 150
# takes: 30
# needs: s3
# kernel log may say: Possible stuck request
# shellcheck source=tests/guest/lib.sh
. /run/guest/lib.sh

disk=s3:$GUEST_S3/disk0/
# Smaller shards than usual: what is not moved through an emulated processor and its network is time won.
driver='sharded[size=256Ki]'
# asked VERB: how many requests of that kind the store has answered.
asked() {
	nbdrsctl --control $CTL status --json | jq "[.exports[0].layers[] | select(.name == \"s3\") | .state |
		to_entries[] | select(.key | startswith(\"$1 \")) | .value | tonumber] | add // 0"
}
objects() {	# shards that are in the store
	nbdrsctl --control $CTL status --json |
		jq '.exports[0].layers[] | select(.name == "sharded") | .state.known_shards | tonumber'
}

must "init" nbdrsd init --size 64Mi "$driver" "$disk"
serve -e disk0 "$driver" "$disk"
must "attach" attached disk0
check "the device has the volume's size" [ "$(blockdev --getsize64 "$dev")" = $((64 << 20)) ]
must "mkfs.ext4" mkfs.ext4 -q "$dev"
mount "$dev" /mnt
check "fio writes and verifies" fio --name=data --filename=/mnt/data --size=8M --bs=16k --rw=randwrite \
	--verify=crc32c --do_verify=1 --end_fsync=1 --ioengine=psync --output=/tmp/fio.out
sum=$(sha256sum </mnt/data)
before=$(asked PUT)
echo flushed >/mnt/flushed
check "sync" bounded 30 sync /mnt/flushed
check "a flush puts" [ "$(asked PUT)" -gt "$before" ]
# What a flush has answered outlives the daemon, and its machine.
kill -KILL "$daemon"
wait "$daemon" || :
serve -e disk0 "$driver" "$disk"
must "attach anew gives the device new connections" attached disk0
check "detach refuses, as it is mounted" eval '! attach -d disk0 2>/dev/null'
must "umount" bounded 40 umount /mnt
check "detach" attach -d disk0
check "the daemon ends with status 0" stop

serve -e disk0 "$driver" "$disk"
must "attach after a restart" attached disk0
check "fsck finds nothing" e2fsck -fn "$dev"
must "mount again" mount "$dev" /mnt
check "what was flushed is there" [ "$(cat /mnt/flushed)" = flushed ]
check "and all that fio wrote" [ "$(sha256sum </mnt/data)" = "$sum" ]
full=$(objects)
rm /mnt/data
bounded 30 sync -f /mnt
check "fstrim" fstrim /mnt
bounded 30 sync -f /mnt
check "gives objects back ($full before, $(objects) after)" [ "$(objects)" -lt "$full" ]
must "umount again" bounded 40 umount /mnt
check "fsck finds nothing" e2fsck -fn "$dev"
check "blkdiscard" blkdiscard "$dev"
check "reads as zeroes" zeroes "$dev" 0 $((16 << 20))
check "no object is left" wait_for 20 eval '[ "$(objects)" = 0 ]'
check "detach again" attach -d disk0
check "and ends" stop

# shellcheck source=tests/guest/mkfs-huge.sh
. /run/guest/mkfs-huge.sh
must "mkfs.ext4, and blkdiscard of 16 TiB, behind 50 ms" mkfs_huge 16Ti "s3:$GUEST_S3/huge/" 1G

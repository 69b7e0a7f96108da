#!/bin/bash
# SPDX-License-Identifier: GPL-3.0-or-later
#
# The daemon is killed under an attached device: requests wait for the dead-connection time-out, then
# fail; no tool ever hangs; the device can be got rid of and used again.
# deadline: 150
# takes: 30
# kernel log may say: Possible stuck request
# shellcheck source=tests/guest/lib.sh
. /run/guest/lib.sh

make_disk /srv/disk0.img 64Mi
serve -e disk0 raw file:/srv/disk0.img
must "attach, dead-connection time-out 6 s" attached --dead-conn-timeout 6 disk0
read_block() { dd if="$dev" of=/dev/null bs=4k count=1 skip="$1" iflag=direct status=none; }
check "reads work" read_block 1
kill -KILL "$daemon"
wait "$daemon" || :
begun=$EPOCHREALTIME
read_block 2 2>/tmp/reader.err &
reader=$!
# While that waits, the tool must answer.
run attach -l
check "-l answers while a request waits" [ "$rc" = 0 ]
check "-l still lists it" grep -q "$name" <<<"$out"
run attach -c "$dev"
check "-c answers" [ "$rc" -le 2 ]
fails '[1-9]|10' . "-d answers, and refuses" attach -d "$dev"
must "the request ends" wait_for 30 ended $reader
waited=$(awk -v a="$begun" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f", b - a }')
run wait $reader
check "with an I/O error" [ "$rc" != 0 ]
check "EIO" grep -qi 'input/output error' /tmp/reader.err
check "after the time-out, not before (6 s; was $waited s)" awk -v w="$waited" 'BEGIN { exit w < 4 || w > 25 }'
begun=$SECONDS
run bounded 20 read_block 3
check "the next request fails at once" [ "$rc" != 0 ] && check "within 5 s" [ $((SECONDS - begun)) -le 5 ]
run attach -d --force "$dev"
check "-d --force gets rid of it (status $rc)" disconnected "$name"

serve -e disk0 raw file:/srv/disk0.img
must "attach to the next daemon" attached disk0 "$dev"
check "reads work again" read_block 4

# Requests that the daemon has but never answers: it is stopped, they pile up, it is killed.
attach -d "$dev"
must "attach again" attached --dead-conn-timeout 5 disk0 "$dev"
kill -STOP "$daemon"
dd if=/dev/zero of="$dev" bs=64k count=32 oflag=direct conv=notrunc status=none 2>/tmp/writer.err &
writer=$!
nap 0.5
check "a stopped daemon: -l answers" attach -l
kill -KILL "$daemon"
wait "$daemon" || :
check "killed with requests in flight: -l answers" attach -l
run attach -d --force "$dev"
check "-d --force answers and gets rid of it (status $rc)" wait_for 15 disconnected "$name"
must "the writer ends" wait_for 20 ended $writer
run wait $writer
check "with an error" [ "$rc" != 0 ]

# Under a mounted file system.
serve -e disk0 raw file:/srv/disk0.img
must "attach once more" attached --dead-conn-timeout 3 disk0 "$dev"
mkfs.ext4 -q "$dev"
mount "$dev" /mnt
echo kept >/mnt/kept
bounded 20 sync -f /mnt
echo lost >/mnt/lost
kill -KILL "$daemon"
wait "$daemon" || :
run bounded 40 sync -f /mnt
check "sync says that data could not be written" [ "$rc" != 0 ]
check "umount ends" bounded 60 umount /mnt
run attach -d --force "$dev"
check "detach says that data was lost: status 10" [ "$rc" = 10 ]
check "gone" disconnected "$name"
serve -e disk0 raw file:/srv/disk0.img
must "attach after the loss" attached disk0 "$dev"
run e2fsck -fy "$dev"
check "fsck mends the file system" [ "$rc" -le 1 ]
mount "$dev" /mnt
check "what was synced is there" [ "$(cat /mnt/kept)" = kept ]
bounded 30 umount /mnt
check "detach" attach -d "$dev"

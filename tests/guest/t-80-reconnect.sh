#!/bin/bash
# SPDX-License-Identifier: GPL-3.0-or-later
#
# A device whose daemon died gets new connections when its export is attached again: requests that wait
# go on, and nothing is lost. Not when the export has become another one.
# deadline: 150
# takes: 12
# kernel log may say: Possible stuck request
# shellcheck source=tests/guest/lib.sh
. /run/guest/lib.sh

make_disk /srv/disk0.img 64Mi
make_disk /srv/disk1.img 32Mi
serve -e disk0 raw file:/srv/disk0.img
must "attach with 2 connections" attached -C 2 --timeout 60 --dead-conn-timeout 120 disk0 /dev/nbd1
mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 "$dev"	# or it writes when the daemon is killed
mount "$dev" /mnt
echo before >/mnt/before
bounded 20 sync -f /mnt

kill -KILL "$daemon"
wait "$daemon" || :
(echo during >/mnt/during && sync -f /mnt) 2>/tmp/sync.err &
writer=$!
fails 3 "$CTL" "no daemon yet: status 3, and it does not hang" attach disk0
check "the writer waits" kill -0 $writer

serve -e disk0 raw file:/srv/disk1.img
fails 5 nbd1 "another disk by that name is not taken: status 5" attach --no-udev disk0
stop
check "the writer still waits" kill -0 $writer

serve -e disk0 raw file:/srv/disk0.img
must "attach again gives it new connections" attached disk0
check "it is the same device" [ "$dev" = /dev/nbd1 ]
must "what waited goes on" wait_for 60 ended $writer
run wait $writer
check "without an error" [ "$rc" = 0 ]
echo after >/mnt/after
check "detach refuses, as it is mounted" eval '! attach -d disk0 2>/dev/null'
bounded 30 umount /mnt
check "detach: status 0, nothing was lost" attach -d disk0
check "fsck finds nothing" e2fsck -fn /srv/disk0.img
modprobe loop
mount -o loop,ro /srv/disk0.img /mnt
check "all that was written is there" [ "$(cat /mnt/before /mnt/during /mnt/after | tr '\n' ' ')" = "before during after " ]
umount /mnt

# Interrupted while it waits, attach leaves nothing behind.
kill -STOP "$daemon"
nbdrs-attach --control $CTL disk0 /dev/nbd2 >/tmp/int.out 2>&1 &
tool=$!
nap 1
kill -TERM $tool
kill -CONT "$daemon"
must "an interrupted attach ends" wait_for 20 ended $tool
run wait $tool
check "with status 130" [ "$rc" = 130 ]
check "and leaves no device" disconnected nbd2

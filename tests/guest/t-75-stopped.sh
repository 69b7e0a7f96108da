#!/bin/bash
# SPDX-License-Identifier: GPL-3.0-or-later
#
# SIGTERM with a device attached: what was asked for is answered, the daemon ends with status 0, the
# device stays for the next daemon or for detach.
# deadline: 90
# takes: 12
# engines: both
# kernel log may say: Possible stuck request
# shellcheck source=tests/guest/lib.sh
. /run/guest/lib.sh

make_disk /srv/disk0.img 64Mi
serve -e disk0 raw file:/srv/disk0.img
must "attach" attached --dead-conn-timeout 5 disk0
# A writer that notes each block it got an answer for.
head -c 64k /dev/urandom >/tmp/data
writer() {
	local n
	for n in $(seq 0 500); do
		dd if=/tmp/data of="$dev" bs=64k count=1 seek="$n" oflag=direct conv=notrunc \
			status=none 2>/dev/null || return 0
		echo "$n" >/tmp/answered
	done
}
writer &
writer=$!
wait_for 20 test -s /tmp/answered
check "SIGTERM: ends with status 0" stop TERM
check "the control socket is gone" [ ! -e $CTL ]
check "the device stays" connected "$name"
run attach -l
check "-l answers" [ "$rc" = 0 ]
# What the kernel had put into the socket when it was closed waits for another daemon, or for the detach.
if ! wait_for 15 ended $writer; then
	check "the writer's request was in flight" eval 'dmesg | grep -q "Possible stuck request"'
	run attach -d --force "$dev"
fi
must "the writer ends after the time-out, or with the device" wait_for 30 ended $writer
answered=$(</tmp/answered)
ok=true
for n in $(seq 0 "$answered"); do
	dd if=/srv/disk0.img bs=64k skip="$n" count=1 status=none | cmp -s - /tmp/data || ok=false
done
check "every answered write is in the file" $ok
run attach -d --force "$dev"
check "detach without a daemon" disconnected "$name"

serve -e disk0 raw file:/srv/disk0.img
must "attach to the next daemon" attached disk0
mkfs.ext4 -q "$dev"
mount "$dev" /mnt
cp /usr/bin/bash /mnt/
bounded 30 umount /mnt
check "detach" attach -d disk0
check "SIGINT ends it with status 0, too" stop INT

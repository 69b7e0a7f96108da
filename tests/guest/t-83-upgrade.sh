#!/bin/bash
# SPDX-License-Identifier: GPL-3.0-or-later
#
# The daemon becomes another program under a file system that is being written and verified: the kernel sees a pause,
# no connection is lost. Says how long requests waited.
# NBDRS_FULL=1: 100 rounds.
# deadline: 150
# deadline full: 3600
# takes: 20
# shellcheck source=tests/guest/lib.sh
. /run/guest/lib.sh
# shellcheck source=tests/guest/survive.sh
. /run/guest/survive.sh 4

begun() { dmesg | grep -cE "Receive control failed|reconnected socket|Dead connection" || :; }

upgrades() {	# CONNECTIONS
	local n=$1 i pid
	make_disk /srv/disk0.img 64Mi
	serve -e disk0 raw file:/srv/disk0.img
	pid=$daemon
	must "attach with $n connections" attached -C "$n" disk0
	mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 "$dev"
	mount "$dev" /mnt
	must "the load runs" load_start
	for ((i = 0; i < rounds; i++)); do
		nap 0.$((RANDOM % 5 + 1))
		bounded 30 nbdrsctl --control $CTL upgrade >/dev/null || break
		mark
		echo "round $i" >/mnt/round
		bounded 30 sync -f /mnt || break
	done
	check "$rounds upgrades: all were done" [ $i = $rounds ]
	must "the load ends" load_stop
	check "no request failed, all that was read back is right" [ "$load_ok" = true ]
	echo "@@ note upgrade, $n connections: $rounds rounds, $load_ios requests, p99 $load_p99 ms, worst $load_worst ms"
	check "no request took longer than 1 s ($load_worst ms)" [ "$load_worst" -le $((1000 * SLOW)) ]
	check "it is the same process" [ "$(nbdrsctl --control $CTL version --json | jq .pid)" = "$pid" ]
	check "that has been replaced $rounds times" [ "$(nbdrsctl --control $CTL version --json | jq .generation)" = $rounds ]
	check "the device is live" [ "$(nbdrs-attach --control $CTL -l --json | jq -r '.devices[0].state')" = live ]
	check "no connection was lost" [ "$(begun)" = 0 ]
	check "no I/O error in the kernel's log" eval '! dmesg | grep -E "I/O error|EXT4-fs error|Buffer I/O"'
	check "unmount" bounded 60 umount /mnt
	check "detach" attach -d disk0
	stop
	check "fsck finds nothing" e2fsck -fn /srv/disk0.img
	rm /srv/disk0.img
}

upgrades 1
upgrades 4

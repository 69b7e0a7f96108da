#!/bin/bash
# SPDX-License-Identifier: GPL-3.0-or-later
#
# The daemon is killed and started again, under a file system that is being written and verified: it finds its
# device by itself, nobody sees an error, nothing is lost. Says how long requests waited.
# NBDRS_FULL=1: 100 rounds.
# deadline: 150
# deadline full: 3600
# takes: 25
# kernel log may say: Possible stuck request
# shellcheck source=tests/guest/lib.sh
. /run/guest/lib.sh
# shellcheck source=tests/guest/survive.sh
. /run/guest/survive.sh 2

crash() {	# CONNECTIONS OPTION...
	local n=$1 i
	shift
	make_disk /srv/disk0.img 64Mi
	serve -e disk0 raw file:/srv/disk0.img
	must "attach with $n connections $*" attached -C "$n" "$@" disk0
	mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 "$dev"
	mount "$dev" /mnt
	must "the load runs" load_start
	for ((i = 0; i < rounds; i++)); do
		nap 0.$((RANDOM % 5 + 3))
		kill -KILL "$daemon"
		wait "$daemon" || :
		# Nothing here may touch the file system: it may have to wait for the daemon that we start next.
		serve -e disk0 raw file:/srv/disk0.img
		mark
		echo "round $i" >/mnt/round
		bounded 30 sync -f /mnt || break
	done
	check "$rounds crashes: all have been lived through" [ $i = $rounds ]
	must "the load ends" load_stop
	check "no request failed, all that was read back is right" [ "$load_ok" = true ]
	echo "@@ note crash, $n connections: $rounds rounds, $load_ios requests, p99 $load_p99 ms, worst $load_worst ms, of it after the new daemon was up $load_after ms"
	check "no request waited longer than 3 s for a daemon that was back ($load_after ms)" \
		[ "$load_after" -le $((3000 * SLOW)) ]
	check "no I/O error in the kernel's log" eval '! dmesg | grep -E "I/O error|EXT4-fs error|Buffer I/O"'
	check "unmount" bounded 60 umount /mnt
	check "detach: nothing was lost" attach -d disk0
	stop
	check "fsck finds nothing" e2fsck -fn /srv/disk0.img
	rm /srv/disk0.img
}

crash 1
# Several connections: the timer that sends again also kills slow connections, so it is for the user to say
# what is slow.
crash 4 --timeout 1

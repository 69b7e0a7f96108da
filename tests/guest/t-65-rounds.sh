#!/bin/bash
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Attach and detach, again and again: no file descriptor, socket, thread or memory is left behind.
# NBDRS_FULL=1: 55 times at least.
# deadline: 240
# takes: 20
# shellcheck source=tests/guest/lib.sh
. /run/guest/lib.sh

make_disk /srv/disk0.img 64Mi
serve -e disk0 raw file:/srv/disk0.img

fds() { ls "/proc/$daemon/fd" | wc -l; }
threads() { ls "/proc/$daemon/task" | wc -l; }
sockets() { wc -l </proc/net/unix; }
memory() { awk '/^Anonymous/ { print $2 }' "/proc/$daemon/smaps_rollup"; }	# KiB
round() {	# NUMBER CONNECTIONS
	attached -C "$2" disk0 || return 1
	dd if=/dev/urandom of="$dev" bs=64k count=4 seek="$1" oflag=direct conv=notrunc status=none || return 1
	attach -d "$dev"
}
rounds() {	# FROM TO: every fifth with four connections
	local n
	for n in $(seq "$1" "$2"); do
		round "$n" $((n % 5 == 0 ? 4 : 1)) || { echo "round $n"; return 1; }
	done
}

must "5 rounds to warm up" rounds 1 5
before="$(fds) file descriptors, $(sockets) sockets"
threads=$(threads)
n=5
more() {
	must "10 rounds" rounds $((n + 1)) $((n + 10))
	n=$((n + 10))
	was=$memory
	memory=$(memory)
}
# Its pools may reach a new peak now and then; what is lost with each round makes every ten of them grow.
is_flat() { [ $((memory - was)) -lt 64 ]; }
memory=$(memory)
least=${NBDRS_FULL:+55}
least=${least:-15}
while more; [ $n -lt "$least" ] || { ! is_flat && [ $n -lt 105 ]; }; do :; done
echo "memory $memory KiB, threads $threads -> $(threads)"
same_as_before() { [[ $before == "$(fds) file descriptors, $(sockets) sockets" ]]; }
check "nothing is left: $before" wait_for 5 same_as_before
# The ring's and the pool's workers come and go.
check "threads do not add up" [ "$(threads)" -le $((threads + 5)) ]
check "memory is flat: less than 64 KiB in ten rounds" is_flat
check "the module can be removed" bounded 20 modprobe -r nbd
check "the daemon ends with status 0" stop
modprobe nbd nbds_max=4 max_part=8

serve -e disk0 raw file:/srv/disk0.img
start_udevd
must "5 rounds with udevd looking on" rounds 1 5

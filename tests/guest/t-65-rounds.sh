#!/bin/bash
# SPDX-License-Identifier: GPL-3.0-or-later
#
# 20 times attach and detach: no file descriptor, socket, thread or memory is left behind.
# NBDRS_FULL=1: 50 times.
# deadline: 180
# takes: 20
# shellcheck source=tests/guest/lib.sh
. /run/guest/lib.sh

make_disk /srv/disk0.img 64Mi
serve -e disk0 raw file:/srv/disk0.img

fds() { ls "/proc/$daemon/fd" | wc -l; }
threads() { ls "/proc/$daemon/task" | wc -l; }
sockets() { wc -l </proc/net/unix; }
rss() { awk '/^VmRSS/ { print $2 }' "/proc/$daemon/status"; }
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
rss=$(rss)
rounds=${NBDRS_FULL:+50}
rounds=${rounds:-20}
must "$rounds rounds" rounds 6 $((5 + rounds))
echo "RSS $rss -> $(rss) KiB, threads $threads -> $(threads)"
same_as_before() { [[ $before == "$(fds) file descriptors, $(sockets) sockets" ]]; }
check "nothing is left: $before" wait_for 5 same_as_before
# The ring's and the pool's workers come and go.
check "threads do not add up" [ "$(threads)" -le $((threads + 5)) ]
check "memory is flat (within 1 MiB)" [ "$(rss)" -le $((rss + 1024)) ]
check "the module can be removed" bounded 20 modprobe -r nbd
check "the daemon ends with status 0" stop
modprobe nbd nbds_max=4 max_part=8

serve -e disk0 raw file:/srv/disk0.img
start_udevd
must "5 rounds with udevd looking on" rounds 1 5

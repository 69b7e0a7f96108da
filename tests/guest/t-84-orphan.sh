#!/bin/bash
# SPDX-License-Identifier: GPL-3.0-or-later
#
# -l says how a device stands with its daemon, --reap detaches what is left over, --watch mends as a service of its own,
# and no daemon takes over a device that was attached to another image.
# deadline: 120
# takes: 15
# kernel log may say: Possible stuck request
# shellcheck source=tests/guest/lib.sh
. /run/guest/lib.sh

state() { nbdrs-attach --control $CTL -l --json | jq -r '.devices[] | select(.device == "'"$1"'") | .state'; }
is() { [ "$(state "$1")" = "$2" ]; }
read_block() { dd if="$dev" of=/dev/null bs=4k count=1 skip="$1" iflag=direct status=none; }

make_disk /srv/disk0.img 64Mi
make_disk /srv/other.img 64Mi
make_disk /srv/small.img 32Mi
serve -e disk0 raw file:/srv/disk0.img
must "attach" attached disk0
check "live" is "$dev" live
run attach -l
check "the table says so, too" grep -Eq "$name .* live" <<<"$out"

kill -KILL "$daemon"
wait "$daemon" || :
check "waiting: no daemon" is "$dev" waiting
fails 3 "only a daemon can tell" "--reap without a daemon: status 3" attach --reap
read_block 1 &
reader=$!

serve -e disk1 raw file:/srv/other.img
check "orphaned: the daemon does not serve it" is "$dev" orphaned
stop
serve -e disk0 raw file:/srv/small.img
check "orphaned: another image by its name" is "$dev" orphaned
check "the request still waits" kill -0 $reader
stop
serve -e disk0 raw file:/srv/other.img
check "orphaned: another image by its name, of the same size" is "$dev" orphaned
check "the request still waits, still" kill -0 $reader
stop

# A daemon that does not mend, as one without privileges does not; and a service that does.
must "a daemon without CAP_SYS_ADMIN serves" serve_unprivileged -e disk0 raw file:/srv/disk0.img
check "cut off: it cannot mend" is "$dev" "cut off"
nbdrs-attach --control $CTL --watch 2>/tmp/watch.err &
watch=$!
must "--watch does, and the request goes on" wait_for 20 ended $reader
run wait $reader
check "without an error" [ "$rc" = 0 ]
check "live again" is "$dev" live
check "it says so" grep -q "new connection" /tmp/watch.err
kill -KILL "$daemon"
wait "$daemon" || :
serve -e disk0 raw file:/srv/disk0.img
check "--watch outlives a daemon, and mends for the next" bounded 20 read_block 2
kill -TERM $watch
check "SIGTERM ends it" wait_for 10 ended $watch
run wait $watch
check "with status 0" [ "$rc" = 0 ]

# Left over.
stop
serve -e disk1 raw file:/srv/other.img
run attach --reap
check "--reap takes it away: status $rc, $out" [ "$rc" = 0 ]
check "it is gone" wait_for 10 disconnected "$name"
must "attach the other" attached disk1
run attach --reap
check "--reap leaves what is served" is "$dev" live
check "detach" attach -d disk1
stop

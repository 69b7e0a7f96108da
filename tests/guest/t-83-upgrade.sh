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

# Beside all other tests the emulated processor waits, too; NBDRS_FULL=1 is for a machine that does nothing else.
limit=${NBDRS_FULL:+1000}
limit=${limit:-3000}
strike() { bounded 30 nbdrsctl --control $CTL upgrade >/dev/null; }
dead() { dmesg | grep -cE "Receive control failed|reconnected socket|Dead connection" || :; }
found() {
	check "no request took longer than $limit ms ($load_worst ms)" [ "$load_worst" -le $((limit * SLOW)) ]
	check "it is the same process" [ "$(nbdrsctl --control $CTL version --json | jq .pid)" = "$daemon" ]
	check "that has been replaced $rounds times" [ "$(nbdrsctl --control $CTL version --json | jq .generation)" = "$rounds" ]
	check "the device is live" [ "$(nbdrs-attach --control $CTL -l --json | jq -r '.devices[0].state')" = live ]
	check "no connection was lost" [ "$(dead)" = 0 ]
}

survive upgrade 1
survive upgrade 4

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

strike() {
	kill -KILL "$daemon"
	wait "$daemon" || :
	serve_disk
}
found() {
	check "no request waited longer than 3 s for a daemon that was back ($load_after ms)" \
		[ "$load_after" -le $((3000 * SLOW)) ]
}

survive crash 1
# Several connections: the timer that sends again also kills slow connections, so it is for the user to say
# what is slow.
survive crash 4 --timeout 1

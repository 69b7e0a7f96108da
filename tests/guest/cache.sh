# SPDX-License-Identifier: GPL-3.0-or-later
# shellcheck shell=sh
#
# cache.sh - what kernel.sh and image.sh share: messages, the cache folder, its lock.

PATH=$PATH:/usr/sbin:/sbin

die() {
	echo "guest: $*" >&2
	exit 1
}

# lacks WHAT: this machine cannot run the guest; the caller decides whether that is a skip.
lacks() {
	echo "guest: needs $*" >&2
	exit 77
}

# need PROGRAM PACKAGE
need() {
	command -v "$1" >/dev/null || lacks "$1 (run: apt-get install $2)"
}

# cache_dir: print a folder that survives between runs and can be written.
cache_dir() {
	d=${NBDRS_CACHE:-${HOME:-/nonexistent}/.cache/nbdrs}/guest
	if ! mkdir -p "$d" 2>/dev/null || ! [ -w "$d" ]; then
		d=$(cd "$(dirname "$0")/../.." && pwd)/${BUILD:-build}/guest-cache
		case ${BUILD:-} in /*) d=$BUILD/guest-cache ;; esac
		mkdir -p "$d" || die "cannot make $d"
	fi
	(cd "$d" && pwd)
}

# lock ENTRY: two runs at once build an entry once. Held until the process ends.
lock() {
	exec 9>"$1.lock"
	flock -w 300 9 || die "another run has held $1.lock for five minutes"
}

#!/bin/bash
# SPDX-License-Identifier: GPL-3.0-or-later
#
# -l, -c and nbdrsctl status tell what is.
# deadline: 60
# takes: 16
# processors: 1
# shellcheck source=tests/guest/lib.sh
. /run/guest/lib.sh

make_disk /srv/disk0.img 64Mi
make_disk /srv/disk1.img 32Mi
run attach -l
check "-l without any device: status 0" [ "$rc" = 0 ]
check "-l --json is empty then" [ "$(attach -l --json | jq -c .devices)" = '[]' ]
fails 1 '' "-c of an unconnected device: status 1" attach -c /dev/nbd0
fails 2 . "-c of what is no nbd device: status 2" attach -c /dev/vda
fails 2 . "-c without a device: status 2" attach -c

serve -e disk0 raw file:/srv/disk0.img -e disk1 raw file:/srv/disk1.img
must "attach two" attached disk0 /dev/nbd0
must "attach the other" attached -r disk1 /dev/nbd3
check "-c of a connected device: status 0" attach -c /dev/nbd0
check "-c by short name" attach -c nbd3
mkfs.ext4 -q /dev/nbd0
mount /dev/nbd0 /mnt
run attach -l
check "-l lists both" grep -q "nbd0.*disk0" <<<"$out"
check "with their exports" grep -q "nbd3.*disk1" <<<"$out"
run attach -l --json
field() { jq -r ".devices[] | select(.device == \"/dev/$1\") | $2" <<<"$out"; }
check "json: export" [ "$(field nbd0 .export)" = disk0 ]
check "json: size in bytes" [ "$(field nbd3 .size)" = $((32 << 20)) ]
check "json: read_only" [ "$(field nbd3 .read_only) $(field nbd0 .read_only)" = 'true false' ]
check "json: block_size" [ "$(field nbd0 .block_size)" = 512 ]
check "json: mounts" [ "$(field nbd0 '.mounts[0]')" = /mnt ]
bounded 30 umount /mnt

truncate -s 16M /tmp/foreign.img
nbdkit -f -U /tmp/foreign.sock file /tmp/foreign.img &
wait_for 10 test -S /tmp/foreign.sock
nbd-client -unix /tmp/foreign.sock /dev/nbd1 >/dev/null
run attach -l --json
check "json: another program's device has no export" [ "$(field nbd1 .export)" = null ]
fails '[1-9]|10' nbd1 "detach does not touch another program's device" attach -d /dev/nbd1
check "it is still there" connected nbd1
nbd-client -d /dev/nbd1

status=$(nbdrsctl --control $CTL status --json)
devices() { jq -r "[.. | objects | select(.name? == \"$1\")] | first | .devices[0].device" <<<"$status"; }
check "nbdrsctl status --json: devices" [ "$(devices disk0) $(devices disk1)" = '/dev/nbd0 /dev/nbd3' ]
check "nbdrsctl status names export and device" grep -q nbd3 <(nbdrsctl --control $CTL status)
check "detach one" attach -d disk0
check "the other stays" attach -c /dev/nbd3
fails 1 '' "the first is gone" attach -c /dev/nbd0
check "detach the other" attach -d disk1

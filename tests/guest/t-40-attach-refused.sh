#!/bin/bash
# SPDX-License-Identifier: GPL-3.0-or-later
#
# What attach refuses or waits for: each with a status of its own and a text that names the thing.
# deadline: 120
# takes: 20
# processors: 1
# shellcheck source=tests/guest/lib.sh
. /run/guest/lib.sh

make_disk /srv/disk0.img 64Mi
make_disk /srv/disk1.img 64Mi

fails 3 "$CTL" "no daemon: status 3, names the socket" attach disk0
serve -e disk0 raw file:/srv/disk0.img -e disk1 raw file:/srv/disk1.img
fails 4 nosuch "unknown export: status 4, names it" attach nosuch
fails 2 /dev/vda "not an nbd device: status 2, names it" attach disk0 /dev/vda
fails 2 . "no export: status 2" attach
fails 2 . "unknown option: status 2" attach --nosuch disk0
fails 2 . "a time that is none: status 2" attach --timeout soon disk0
fails '[125]' nbd99999999 "a device number out of range: names it" attach disk0 /dev/nbd99999999
check "nothing was attached by all that" [ "$(attach -l --json | jq '.devices | length')" = 0 ]

must "attach disk0" attached disk0 /dev/nbd0
must "attach it again: same device, status 0" attached disk0
check "it is that device" [ "$dev" = /dev/nbd0 ]
must "and by name" attached disk0 /dev/nbd0
check "attached once only" [ "$(attach -l --json | jq '.devices | length')" = 1 ]
fails 5 nbd0 "attached elsewhere: status 5, names the device" attach disk0 /dev/nbd1
fails 5 nbd0 "busy with another export: status 5, names it" attach disk1 /dev/nbd0
check "disk0 is not disturbed" dd if=/dev/nbd0 of=/dev/null bs=64k count=16 iflag=direct status=none
check "detach disk0" attach -d disk0

# Whoever looks at an unconnected node for a moment (udev, blkid) makes CONNECT fail with EBUSY.
hold /dev/nbd1
(nap 1.5; kill "$holder") &
must "a device that is open for a moment: attach waits for it" attached disk0 /dev/nbd1
check "detach it" attach -d disk0
hold /dev/nbd1
fails '[58]' nbd1 "a device that stays open: names it" attach disk0 /dev/nbd1
release
must "attach once it is free" attached disk0 /dev/nbd1
check "detach that" attach -d disk0

must "a device that is not there is made" attached disk0 /dev/nbd9
check "it works" dd if=/dev/nbd9 of=/dev/null bs=64k count=1 iflag=direct status=none
check "detach the made one" attach -d nbd9

chmod 711 /run/nbdrs
fails 7 root "as nobody: status 7, says root" attach_as_nobody disk0

bounded 20 modprobe -r nbd
must "the module is loaded when it is not there" attached disk0
check "detach once more" attach -d disk0
bounded 20 modprobe -r nbd
mkdir -p /etc/modprobe.d
echo 'install nbd /bin/false' >/etc/modprobe.d/no-nbd.conf
fails 6 'modprobe nbd' "no nbd module: status 6, says the mend" attach disk0
fails 1 '' "-c says not connected" attach -c /dev/nbd0

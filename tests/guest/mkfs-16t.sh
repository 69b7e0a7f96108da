#!/bin/bash
# SPDX-License-Identifier: GPL-3.0-or-later
# Runs in the guest of mkfs-16t.
# shellcheck source=tests/guest/lib.sh
. /run/guest/lib.sh
# shellcheck source=tests/guest/mkfs-huge.sh
. /run/guest/mkfs-huge.sh
modprobe nbd nbds_max=4 max_part=8
mkfs_huge "${HUGE:-16Ti}" "s3:$GUEST_S3/huge/"

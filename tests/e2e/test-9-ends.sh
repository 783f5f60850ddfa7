# What several tests share is taken down, and the first node is as the next run expects it.
# shellcheck shell=bash

test_fleet_ends() {
    need_speedy
    stand_in_ends
    if [[ -d $W/b ]]; then
        on b cri_reset
        on b remove_everything
        on b node_remove
        daemon_stop link
    fi
    if [[ -e $W/cluster/complete ]]; then cluster stop; fi
    fresh_speedy
}

//! The protocol by itself: scripts over [`metcd::consensus`] alone, one behaviour a file. Time, disks, the wire and the state machine
//! are the script's. What is to hold whatever fails is the simulation's business (`tests/sim`).

mod harness;

mod a_disk_that_disagrees_is_refused;
mod a_joint_configuration_is_left;
mod a_removed_member_hears_of_it;
mod a_slow_state_machine_holds_its_log_back;
mod acknowledgements_wait_for_the_sync;
mod configuration_changes_at_apply;
mod nobody_campaigns_while_installing;
mod one_change_at_a_time;
mod the_absent_disturb_nobody;

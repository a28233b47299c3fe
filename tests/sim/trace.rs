//! How events read in a trace.

use raft::eraftpb::Message;

/// One line for a raft message.
pub fn message(message: &Message) -> String {
    let reject = if message.reject { " reject" } else { "" };
    let entries = match message.entries.len() {
        0 => String::new(),
        n => format!(" +{n}"),
    };
    format!(
        "n{}->n{} {:?} t{} i{} lt{} c{}{entries}{reject}",
        message.from,
        message.to,
        message.get_msg_type(),
        message.term,
        message.index,
        message.log_term,
        message.commit
    )
}

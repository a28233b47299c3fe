//! The client commands as a shell meets them, against real servers on loopback ports.

mod backup;
mod cluster;
mod coordination;
mod every_command;
mod keys;
mod load;
mod logs;
mod shell;
mod support;
mod terminal;

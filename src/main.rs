//! The `metcd` program.

use std::process::ExitCode;

/// Many threads allocate small values of many sizes; the system allocator keeps more and waits more.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    metcd::cli::main(std::env::args_os())
}

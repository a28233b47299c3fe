#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    assert!(metcd::fuzzing::run("peer_messages", data));
});

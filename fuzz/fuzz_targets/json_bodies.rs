#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    assert!(metcd::fuzzing::run("json_bodies", data));
});

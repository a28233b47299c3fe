//! Snapshots: encode, verify, install.

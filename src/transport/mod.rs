//! Between the members: HTTP POSTs over `reqwest`, a listener of its own, nothing stepped that was not checked.

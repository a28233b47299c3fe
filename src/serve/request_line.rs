//! What the HTTP library overlooks in the first line of a request.
//!
//! A request target has no fragment (RFC 9112 3.2). The `http` crate takes one for granted and drops it: `DELETE /v1/kv?prefix=#tmp/` from a
//! client that does not escape would be a delete of everything. So a `#` there is made a byte that the library refuses, and the client gets
//! its `400`. Over HTTP/2 the target is compressed, and nothing can be done here; nor is a request looked at that was sent before the one before it
//! was answered, which no client does that anybody uses by hand.

/// Follows an HTTP/1 head until its first line is over.
#[derive(Debug, Default)]
pub(super) struct RequestLine {
    /// It has begun: before it empty lines may come.
    begun: bool,
    over: bool,
}

impl RequestLine {
    /// The line has ended, and what follows is not looked at.
    pub(super) fn is_over(&self) -> bool {
        self.over
    }

    /// The next bytes of the connection.
    pub(super) fn take(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            match byte {
                _ if self.over => return,
                b'\r' | b'\n' if !self.begun => {}
                b'\n' => self.over = true,
                b'#' => *byte = b'<',
                _ => self.begun = true,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(pieces: &[&str]) -> String {
        let mut line = RequestLine::default();
        let taken = pieces.iter().flat_map(|piece| {
            let mut bytes = piece.as_bytes().to_vec();
            line.take(&mut bytes);
            bytes
        });
        String::from_utf8(taken.collect()).expect("as it was")
    }

    #[test]
    fn only_the_first_line_is_looked_at_however_it_arrives() {
        assert_eq!(taken(&["PUT /a#b HTTP/1.1\r\nx: #\r\n\r\n#"]), "PUT /a<b HTTP/1.1\r\nx: #\r\n\r\n#");
        assert_eq!(
            taken(&["\r\n\r", "\nPUT /", "a", "#b H", "TTP/1.1\r", "\n#"]),
            "\r\n\r\nPUT /a<b HTTP/1.1\r\n#"
        );
        assert_eq!(taken(&["PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n##"]), "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n##");
    }
}

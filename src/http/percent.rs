//! Percent encoding, byte by byte: decoded exactly once, `+` is a plus, nothing is folded.

/// Decodes `%XX` escapes; every other byte stands for itself. `None` if an escape is broken.
pub(super) fn decode(raw: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(raw.len());
    let mut rest = raw.iter();
    while let Some(&byte) = rest.next() {
        bytes.push(match byte {
            b'%' => (hex_digit(*rest.next()?)? << 4) | hex_digit(*rest.next()?)?,
            plain => plain,
        });
    }
    Some(bytes)
}

fn hex_digit(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        b'A'..=b'F' => Some(digit - b'A' + 10),
        _ => None,
    }
}

/// Encodes bytes so that they can stand in a path or a query value of any URL; `/` stays, for readability.
pub(super) fn encode(bytes: &[u8]) -> String {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    let mut text = String::with_capacity(bytes.len());
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~' | b'/') {
            text.push(char::from(byte));
        } else {
            text.push('%');
            text.push(char::from(HEX[usize::from(byte >> 4)]));
            text.push(char::from(HEX[usize::from(byte & 0xf)]));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_survives_encoding_and_one_decoding() {
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(decode(encode(&all).as_bytes()), Some(all));
    }

    #[test]
    fn decodes_once_and_leaves_plus_alone() {
        assert_eq!(decode(b"a%252Fb+c%2f%00"), Some(b"a%2Fb+c/\0".to_vec()));
    }

    #[test]
    fn a_broken_escape_is_none() {
        for broken in ["%", "%4", "a%zz", "%4g", "%%41"] {
            assert_eq!(decode(broken.as_bytes()), None, "{broken}");
        }
    }
}

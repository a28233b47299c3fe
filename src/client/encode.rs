//! Keys into URLs: every byte that is not unreserved (RFC 3986) becomes `%XX`, so that what arrives is what was meant.

/// Percent-encodes all bytes but letters, digits and `-._~`.
#[must_use]
pub fn percent_encode(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len() + 16);
    push_encoded(&mut out, bytes);
    out
}

pub(super) fn push_encoded(out: &mut String, bytes: &[u8]) {
    const DIGITS: [char; 16] = ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'A', 'B', 'C', 'D', 'E', 'F'];
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push('%');
            out.push(DIGITS[usize::from(byte >> 4)]);
            out.push(DIGITS[usize::from(byte & 15)]);
        }
    }
}

/// A path with its query in the making.
#[derive(Debug, Clone)]
pub(super) struct Target {
    text: String,
    has_query: bool,
}

impl Target {
    pub(super) fn new(path: &str) -> Target {
        Target {
            text: path.to_owned(),
            has_query: false,
        }
    }

    /// The path of a key.
    pub(super) fn key(key: &[u8]) -> Target {
        let mut target = Target::new("/v1/kv/");
        push_encoded(&mut target.text, key);
        target
    }

    /// Appends a parameter.
    pub(super) fn set(&mut self, name: &str, value: impl AsRef<[u8]>) {
        self.text.push(if self.has_query { '&' } else { '?' });
        self.has_query = true;
        self.text.push_str(name);
        self.text.push('=');
        push_encoded(&mut self.text, value.as_ref());
    }

    /// Appends a parameter if it has a value.
    pub(super) fn set_number(&mut self, name: &str, value: Option<u64>) {
        if let Some(value) = value {
            self.set(name, value.to_string());
        }
    }

    /// Appends `name=true` if so.
    pub(super) fn set_flag(&mut self, name: &str, value: bool) {
        if value {
            self.set(name, "true");
        }
    }

    pub(super) fn as_str(&self) -> &str {
        &self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_that_is_not_unreserved_is_encoded() {
        assert_eq!(percent_encode(b"aZ09-._~"), "aZ09-._~");
        assert_eq!(percent_encode(b"a/b c+%\0\xff\xc3\xa4"), "a%2Fb%20c%2B%25%00%FF%C3%A4");
        assert_eq!(percent_encode(b".."), "..");
    }

    #[test]
    fn parameters_are_joined_and_encoded() {
        let mut target = Target::key(b"a&b");
        target.set_number("revision", Some(7));
        target.set_number("limit", None);
        target.set_flag("prev", true);
        target.set("prefix", b"x=y&");
        assert_eq!(target.as_str(), "/v1/kv/a%26b?revision=7&prev=true&prefix=x%3Dy%26");
    }
}

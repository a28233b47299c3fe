//! The opaque token that continues a list: it names the first page's revision, so that pages never tear.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use super::error::ApiError;
use super::json::invalid;
use crate::state::command::KeySpan;

/// First byte of a token: the layout.
const LAYOUT: u8 = 1;
/// Layout, revision, count.
const HEAD_BYTES: usize = 1 + 8 + 8;
const DIGEST_BYTES: usize = 8;

/// Where a list goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PageToken {
    /// Revision of the first page, and so of all.
    pub(super) revision: u64,
    /// Keys in the whole range at that revision: counted once.
    pub(super) count: u64,
    /// The last key of the page before.
    pub(super) last_key: Vec<u8>,
}

impl PageToken {
    /// As text. The digest binds it to the range and the order it was made for.
    pub(super) fn encode(&self, span: &KeySpan, descending: bool) -> String {
        let mut bytes = Vec::with_capacity(HEAD_BYTES + self.last_key.len() + DIGEST_BYTES);
        bytes.push(LAYOUT);
        bytes.extend_from_slice(&self.revision.to_be_bytes());
        bytes.extend_from_slice(&self.count.to_be_bytes());
        bytes.extend_from_slice(&self.last_key);
        let digest = digest(&bytes, span, descending);
        bytes.extend_from_slice(&digest);
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// Refuses a token of another range or order, or one that this server did not make.
    pub(super) fn decode(text: &[u8], span: &KeySpan, descending: bool) -> Result<PageToken, ApiError> {
        Self::try_decode(text, span, descending)
            .ok_or_else(|| invalid("`after` must be the `next` of the page before, with the same range and order".to_owned()))
    }

    fn try_decode(text: &[u8], span: &KeySpan, descending: bool) -> Option<PageToken> {
        let bytes = URL_SAFE_NO_PAD.decode(text).ok()?;
        let (body, found) = bytes.split_at_checked(bytes.len().checked_sub(DIGEST_BYTES)?)?;
        if found != digest(body, span, descending) {
            return None;
        }
        let (layout, rest) = body.split_first()?;
        let (revision, rest) = rest.split_first_chunk::<8>()?;
        let (count, last_key) = rest.split_first_chunk::<8>()?;
        (*layout == LAYOUT).then(|| PageToken {
            revision: u64::from_be_bytes(*revision),
            count: u64::from_be_bytes(*count),
            last_key: last_key.to_vec(),
        })
    }
}

fn digest(body: &[u8], span: &KeySpan, descending: bool) -> [u8; DIGEST_BYTES] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&[u8::from(descending), u8::from(span.end.is_some())]);
    for piece in [&span.start[..], span.end.as_deref().unwrap_or_default(), body] {
        hasher.update(&(piece.len() as u64).to_le_bytes());
        hasher.update(piece);
    }
    let mut digest = [0; DIGEST_BYTES];
    hasher.finalize_xof().fill(&mut digest);
    digest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_continues_its_own_query_and_no_other() {
        let token = PageToken {
            revision: 7,
            count: 3,
            last_key: b"a/\xff".to_vec(),
        };
        let span = KeySpan::prefix(b"a/");
        let text = token.encode(&span, false);
        assert!(
            text.bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_'),
            "{text}"
        );
        assert_eq!(PageToken::decode(text.as_bytes(), &span, false).unwrap(), token);
        assert!(PageToken::decode(text.as_bytes(), &span, true).is_err());
        assert!(PageToken::decode(text.as_bytes(), &KeySpan::prefix(b"b/"), false).is_err());
        assert!(
            PageToken::decode(
                text.as_bytes(),
                &KeySpan {
                    start: "a/".into(),
                    end: None
                },
                false
            )
            .is_err()
        );
    }

    #[test]
    fn rubbish_is_refused() {
        let span = KeySpan::prefix(b"");
        let text = PageToken {
            revision: 7,
            count: 3,
            last_key: b"k".to_vec(),
        }
        .encode(&span, false);
        for cut in 0..text.len() {
            assert!(PageToken::decode(&text.as_bytes()[..cut], &span, false).is_err(), "{cut}");
        }
        assert!(PageToken::decode(b"!!", &span, false).is_err());
    }
}

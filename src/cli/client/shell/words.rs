//! A line cut into words: blanks separate, quotes and backslashes keep together, `\xNN` in double quotes is a byte.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;

/// The words of a line.
///
/// # Errors
/// A quote is not closed, or nothing follows a backslash.
pub(super) fn split(line: &str) -> Result<Vec<OsString>, String> {
    let mut words = Vec::new();
    let mut word: Option<Vec<u8>> = None;
    let mut rest = line.chars();
    while let Some(c) = rest.next() {
        match c {
            ' ' | '\t' | '\n' | '\r' => words.extend(word.take()),
            '#' if word.is_none() => break,
            '\'' => single_quoted(&mut rest, word.get_or_insert_default())?,
            '"' => double_quoted(&mut rest, word.get_or_insert_default())?,
            '\\' => {
                let next = rest.next().ok_or("nothing follows the backslash")?;
                push(word.get_or_insert_default(), next);
            }
            c => push(word.get_or_insert_default(), c),
        }
    }
    words.extend(word);
    Ok(words.into_iter().map(OsString::from_vec).collect())
}

fn push(word: &mut Vec<u8>, c: char) {
    word.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
}

fn single_quoted(rest: &mut std::str::Chars<'_>, word: &mut Vec<u8>) -> Result<(), String> {
    for c in rest {
        match c {
            '\'' => return Ok(()),
            c => push(word, c),
        }
    }
    Err("a quote is not closed".to_owned())
}

fn double_quoted(rest: &mut std::str::Chars<'_>, word: &mut Vec<u8>) -> Result<(), String> {
    while let Some(c) = rest.next() {
        match c {
            '"' => return Ok(()),
            '\\' => match rest.next() {
                Some('n') => word.push(b'\n'),
                Some('t') => word.push(b'\t'),
                Some('x') => {
                    let digits: String = rest.by_ref().take(2).collect();
                    let byte = u8::from_str_radix(&digits, 16).map_err(|_| format!("\\x{digits} is not a byte"))?;
                    word.push(byte);
                }
                Some(c) => push(word, c),
                None => return Err("nothing follows the backslash".to_owned()),
            },
            c => push(word, c),
        }
    }
    Err("a quote is not closed".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<Vec<u8>> {
        split(line).unwrap().into_iter().map(OsString::into_vec).collect()
    }

    #[test]
    fn quotes_and_backslashes_keep_words_together() {
        assert_eq!(words("  set a\thello-world "), [&b"set"[..], b"a", b"hello-world"]);
        assert_eq!(words(r#"set 'a b' "c \"d\"" e\ f"#), [&b"set"[..], b"a b", b"c \"d\"", b"e f"]);
        assert_eq!(words(r#"set "\xff\n" ''"#), [&b"set"[..], b"\xff\n", b""]);
        assert_eq!(words("ls # all of them"), [&b"ls"[..]]);
        assert_eq!(words("set a #b"), [&b"set"[..], b"a"]);
        assert_eq!(words("set a x#b"), [&b"set"[..], b"a", b"x#b"]);
        assert!(words("").is_empty());
    }

    #[test]
    fn what_is_not_closed_is_refused() {
        for bad in ["set 'a", "set \"a", "set a\\", r#"set "\xg1""#] {
            assert!(split(bad).is_err(), "{bad}");
        }
    }
}

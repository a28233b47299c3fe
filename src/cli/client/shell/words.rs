//! A line cut into words: blanks separate, quotes and backslashes keep together, `\xNN` in double quotes is a byte.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::str::CharIndices;

/// The words of a line.
///
/// # Errors
/// A quote is not closed, or nothing follows a backslash.
pub(super) fn split(line: &str) -> Result<Vec<OsString>, String> {
    let Cut {
        mut words, open, trouble, ..
    } = cut(line);
    if let Some(trouble) = trouble {
        return Err(trouble);
    }
    words.extend(open.map(|word| word.bytes));
    Ok(words.into_iter().map(OsString::from_vec).collect())
}

/// The word at the end of a line that is still being typed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Unfinished {
    /// The words before it.
    pub(super) before: Vec<OsString>,
    /// Where it begins, its quote included.
    pub(super) start: usize,
    /// What it stands for so far; nothing after a blank.
    pub(super) bytes: Vec<u8>,
}

/// What is being typed at the end of `line`; none in a comment, or where it went wrong before.
pub(super) fn unfinished(line: &str) -> Option<Unfinished> {
    let cut = cut(line);
    if !cut.is_whole {
        return None;
    }
    let nothing_yet = Open {
        start: line.len(),
        bytes: Vec::new(),
    };
    let Open { start, bytes } = cut.open.unwrap_or(nothing_yet);
    let before = cut.words.into_iter().map(OsString::from_vec).collect();
    Some(Unfinished { before, start, bytes })
}

/// A word as it must be typed; `always` in quotes, or only if it has to be.
pub(super) fn quoted(word: &[u8], always: bool) -> String {
    let is_plain = |c: char| !c.is_whitespace() && !c.is_control() && !"'\"\\#".contains(c);
    if let Ok(text) = std::str::from_utf8(word)
        && !always
        && !text.is_empty()
        && text.chars().all(is_plain)
    {
        return text.to_owned();
    }
    let mut out = String::from("\"");
    for chunk in word.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '"' | '\\' => out.extend(['\\', c]),
                '\n' => out.push_str("\\n"),
                '\t' => out.push_str("\\t"),
                c if c.is_control() => c.encode_utf8(&mut [0; 4]).bytes().for_each(|byte| push_byte(&mut out, byte)),
                c => out.push(c),
            }
        }
        chunk.invalid().iter().for_each(|&byte| push_byte(&mut out, byte));
    }
    out.push('"');
    out
}

fn push_byte(out: &mut String, byte: u8) {
    out.push_str(&format!("\\x{byte:02x}"));
}

struct Cut {
    /// Those that a blank ended.
    words: Vec<Vec<u8>>,
    /// The last one, as far as it goes.
    open: Option<Open>,
    /// Why the last one is not whole.
    trouble: Option<String>,
    /// The line was looked at to its end, rather than to a comment or a mistake.
    is_whole: bool,
}

struct Open {
    start: usize,
    bytes: Vec<u8>,
}

fn cut(line: &str) -> Cut {
    let mut cut = Cut {
        words: Vec::new(),
        open: None,
        trouble: None,
        is_whole: true,
    };
    let mut rest = line.char_indices();
    while let Some((start, c)) = rest.next() {
        if matches!(c, ' ' | '\t' | '\n' | '\r') {
            cut.words.extend(cut.open.take().map(|word| word.bytes));
            continue;
        }
        if c == '#' && cut.open.is_none() {
            cut.is_whole = false;
            break;
        }
        let word = cut.open.get_or_insert(Open { start, bytes: Vec::new() });
        let taken = match c {
            '\'' => single_quoted(&mut rest, &mut word.bytes),
            '"' => double_quoted(&mut rest, &mut word.bytes),
            '\\' => escaped(&mut rest, &mut word.bytes),
            c => {
                push(&mut word.bytes, c);
                Ok(())
            }
        };
        if let Err(trouble) = taken {
            cut.trouble = Some(trouble);
            cut.is_whole = rest.as_str().is_empty();
            break;
        }
    }
    cut
}

fn push(word: &mut Vec<u8>, c: char) {
    word.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
}

fn escaped(rest: &mut CharIndices<'_>, word: &mut Vec<u8>) -> Result<(), String> {
    let (_, next) = rest.next().ok_or("nothing follows the backslash")?;
    push(word, next);
    Ok(())
}

fn single_quoted(rest: &mut CharIndices<'_>, word: &mut Vec<u8>) -> Result<(), String> {
    for (_, c) in rest {
        match c {
            '\'' => return Ok(()),
            c => push(word, c),
        }
    }
    Err("a quote is not closed".to_owned())
}

fn double_quoted(rest: &mut CharIndices<'_>, word: &mut Vec<u8>) -> Result<(), String> {
    while let Some((_, c)) = rest.next() {
        match c {
            '"' => return Ok(()),
            '\\' => match rest.next().map(|(_, c)| c) {
                Some('n') => word.push(b'\n'),
                Some('t') => word.push(b'\t'),
                Some('x') => {
                    let digits: String = rest.by_ref().take(2).map(|(_, c)| c).collect();
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

    #[test]
    fn what_is_quoted_is_one_word_again() {
        assert_eq!(quoted(b"some/key-1", false), "some/key-1");
        assert_eq!(quoted(b"a b", false), r#""a b""#);
        assert_eq!(quoted(b"plain", true), r#""plain""#);
        for word in [
            &b""[..],
            b"a b",
            b"#x",
            b"it's \"so\"\\",
            b"\n\t\r\x1b",
            b"\xff\xc3\xa4 \xc3",
            "\u{85}\u{a0}\u{3000}".as_bytes(),
        ] {
            assert_eq!(words(&quoted(word, false)), [word], "{}", quoted(word, false));
        }
    }

    #[test]
    fn the_word_that_is_being_typed_is_known_in_its_quotes() {
        let typed = |line: &str| unfinished(line).map(|word| (word.before.len(), word.start, word.bytes));
        assert_eq!(typed(""), Some((0, 0, b"".to_vec())));
        assert_eq!(typed("ge"), Some((0, 0, b"ge".to_vec())));
        assert_eq!(typed("get "), Some((1, 4, b"".to_vec())));
        assert_eq!(typed("get \"a b"), Some((1, 4, b"a b".to_vec())));
        assert_eq!(typed("get 'a b"), Some((1, 4, b"a b".to_vec())));
        assert_eq!(typed("get a\\ b"), Some((1, 4, b"a b".to_vec())));
        assert_eq!(typed("get 'a b' c"), Some((2, 10, b"c".to_vec())));
        assert_eq!(typed("get # a"), None);
        assert_eq!(typed(r#"get "\xzz" b"#), None);
    }
}

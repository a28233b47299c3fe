//! The shell, from a pipe and at a terminal.

use std::io::Write as _;
use std::process::{Command, Stdio};

use crate::support::{Running, Server, until};
use crate::terminal::Terminal;

#[test]
fn a_script_from_a_pipe_is_carried_out_line_by_line() {
    let server = Server::start();
    let script = "set a hello-world\n\n# a comment\nget a\nset 'b c' \"x\\ny\"\nls\nmembers\nstatus\ntxn {\"then\":[{\"put\":{\"key\":\"t\",\"value\":\"a b\"}}]}\nget t\ndel a\nhelp\nexit\nset never 1\n";
    let done = server.metcd_with(&["shell"], script.as_bytes());
    assert_eq!((done.code, done.stderr.as_str()), (0, ""));
    let text = done.text();
    assert!(text.starts_with("revision 2\nhello-world\nrevision 3\n"), "{text}");
    for part in ["a\nb c\n", "voter, leader", "ENDPOINT", "a b", "Ctrl-D"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("metcd> "), "no prompt into a pipe: {text}");
    server.fails(3, &["get", "never"]);
    assert_eq!(server.ok(&["get", "b c"]), "x\ny");
}

#[test]
fn a_line_that_is_no_text_fails_alone_and_members_are_asked_for_as_on_the_command_line() {
    let server = Server::start();
    let done = server.metcd_with(
        &["shell"],
        b"set a 1\nset \xff 2\nget a\r\nleader\nleader show\nmember list -o json\n",
    );
    assert_eq!((done.code, done.stderr.lines().count()), (2, 1), "{}", done.stderr);
    assert!(done.stderr.contains("not UTF-8"), "{}", done.stderr);
    let text = done.text();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[lines.len() - 4..lines.len() - 1], ["1", "1", "1"], "{lines:?}");
    assert!(lines[lines.len() - 1].contains("\"peer_url\""), "{lines:?}");
}

#[test]
fn a_failed_line_does_not_stop_a_script_and_is_its_exit_code() {
    let server = Server::start();
    let done = server.metcd_with(&["shell"], b"get missing\nfrobnicate\nset a 'x\nset a -\nset a 1\n");
    assert_eq!((done.code, done.stderr.lines().count()), (3, 4), "{}", done.stderr);
    assert_eq!(server.ok(&["get", "a"]), "1");
}

#[test]
fn a_line_says_how_it_is_printed_and_mistakes_are_told_for_the_shell() {
    let server = Server::start();
    server.ok(&["put", "a", "1"]);
    let ok = server.metcd_with(&["shell"], b"get a -o json\nget a\nget a --timeout 3s --serializable\nset --help\n");
    assert_eq!((ok.code, ok.stderr.as_str()), (0, ""));
    let text = ok.text();
    assert!(text.starts_with("{\"key\":\"a\",\"value\":\"1\""), "{text}");
    assert!(text.contains("}\n1\n1\n"), "for that line only: {text}");
    assert!(text.contains("  set greeting hello\n") && !text.contains("metcd put"), "{text}");
    for (line, told) in [
        ("get a --endpoints http://x:1", "start it with --endpoints"),
        ("rm a", "'del'"),
        ("zzzzz", ": see help\n"),
    ] {
        let done = server.metcd_with(&["shell"], line.as_bytes());
        assert!(done.code == 2 && done.stderr.contains(told), "{}", done.stderr);
    }
}

/// At a terminal Ctrl-C ends a line; the signal of a script is for all of it.
#[test]
fn a_script_that_is_interrupted_ends_as_a_whole_also_while_it_waits_for_a_line() {
    let server = Server::start();
    server.ok(&["put", "a", "1"]);
    let dir = tempfile::tempdir().unwrap();
    let name = dir.path().display();
    for line in [
        format!(
            "watch a --from-revision 2 -- sh -c 'trap \"touch {name}/stopped; exit\" TERM; touch {name}/began; while :; do sleep 0.05; done'\nset never 1\n"
        ),
        format!("watch a --from-revision 2 --count 1 -- touch {name}/began\n"),
    ] {
        let mut shell = server.command();
        shell.arg("shell").stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut shell = Running(shell.spawn().unwrap());
        let mut keyboard = shell.0.stdin.take().unwrap();
        keyboard.write_all(line.as_bytes()).unwrap();
        until("the line is carried out", || dir.path().join("began").exists());
        let pid = shell.0.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        assert_eq!(shell.0.wait().unwrap().code(), Some(143));
        std::fs::remove_file(dir.path().join("began")).unwrap();
    }
    assert!(dir.path().join("stopped").exists());
    server.fails(3, &["get", "never"]);
}

#[test]
fn at_a_terminal_there_is_a_prompt_completion_and_history() {
    let server = Server::start();
    server.ok(&["put", "some/long-key", "the-value"]);
    server.ok(&["put", "with some blanks", "another"]);
    let state = tempfile::tempdir().unwrap();
    let Some(mut terminal) = Terminal::open(&server, "shell", state.path()) else {
        return;
    };
    terminal.shows("metcd> ");
    terminal.types("get some/l\t");
    terminal.shows("some/long-key");
    terminal.types("\r");
    terminal.shows("the-value");
    terminal.shows("metcd> ");
    terminal.types("get wi\t");
    terminal.shows("\"with some blanks\"");
    terminal.types("\r");
    terminal.shows("another");
    terminal.shows("metcd> ");
    // An open quote is gone on with.
    terminal.types("get 'with s\t");
    terminal.shows("\"with some blanks\"");
    terminal.types("\r");
    terminal.shows("another");
    terminal.shows("metcd> ");
    terminal.types("get some/long-key\r");
    terminal.shows("the-value");
    terminal.shows("metcd> ");
    terminal.types("sta\t");
    terminal.shows("status");
    // Ctrl-C drops the line.
    terminal.types("\x03");
    terminal.shows("metcd> ");
    terminal.types("get nothing\r");
    terminal.shows("there is no such key");
    terminal.shows("metcd> ");
    // The line before the last.
    terminal.types("\x1b[A\x1b[A\r");
    terminal.shows("the-value");
    terminal.types("exit\r");
    let history = state.path().join("metcd/history");
    until("the history is saved", || {
        std::fs::read_to_string(&history).is_ok_and(|text| text.contains("get some/long-key"))
    });
}

#[test]
fn a_line_can_be_edited_before_it_is_carried_out() {
    const LEFT: &str = "\x1b[D";
    const RIGHT: &str = "\x1b[C";
    const HOME: &str = "\x1b[H";
    const END: &str = "\x1b[F";
    const DELETE: &str = "\x1b[3~";
    const BACKSPACE: &str = "\x7f";
    let server = Server::start();
    let state = tempfile::tempdir().unwrap();
    let Some(mut terminal) = Terminal::open(&server, "shell", state.path()) else {
        return;
    };
    terminal.shows("metcd> ");
    for (key, typed) in [
        ("left", format!("set left 124{LEFT}3\r")),
        ("right", format!("set right 14{LEFT}{LEFT}{RIGHT}23\r")),
        ("backspace", format!("set backspace 12x{BACKSPACE}34\r")),
        ("delete", format!("set delete 12x34{LEFT}{LEFT}{LEFT}{DELETE}\r")),
        ("home", format!("et home 123{HOME}s{END}4\r")),
        ("ctrl", "et ctrl 123\x01s\x054\r".to_owned()),
        // Ctrl-U takes all that is before the cursor.
        ("kill", "del everything\x15set kill 1234\r".to_owned()),
    ] {
        terminal.types(&typed);
        terminal.shows("revision ");
        terminal.shows("metcd> ");
        assert_eq!(server.ok(&["get", key]), "1234", "{key}");
    }
}

#[test]
fn a_list_that_a_limit_cut_short_says_so_at_a_terminal_only() {
    let server = Server::start();
    server.ok(&["put", "a", "1"]);
    server.ok(&["put", "b", "1"]);
    assert_eq!(server.ok(&["ls", "--limit", "1"]), "a\n", "and nothing on stderr");
    let state = tempfile::tempdir().unwrap();
    if let Some(terminal) = Terminal::open(&server, "ls --limit 1", state.path()) {
        terminal.shows("1 of 2 keys");
    }
}

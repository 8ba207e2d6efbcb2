//! Tests the scripts that the Makefile uses.

use std::process::{Command, Output};

use crate::build::workspace;

fn heartbeat(script: &str) -> Output {
    let command = workspace().join("scripts/heartbeat");
    Command::new(command).args(["bash", "-c", script]).output().unwrap()
}

#[test]
fn output_and_status_are_passed_through() {
    let output = heartbeat("echo '  a line'; echo; echo another >&2; printf 'no newline'; exit 7");
    assert_eq!(output.status.code(), Some(7));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "  a line\n\nanother\nno newline");
}

#[test]
fn silence_is_interrupted() {
    let output = heartbeat("printf 'test slow ... '; sleep 11; echo ok");
    let stdout = String::from_utf8_lossy(&output.stdout);
    let lines: Vec<_> = stdout.lines().collect();
    let beats = &lines[1..lines.len() - 1];
    assert!(!beats.is_empty() && beats.iter().all(|line| line.starts_with("... ")), "{stdout}");
    assert!(beats.iter().all(|line| line.ends_with(" s, last: test slow ... ")), "{stdout}");
    assert_eq!((lines[0], lines[lines.len() - 1]), ("test slow ... ", "ok"));
}

//! Running a command whose output is test results.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use crate::tally::Row;

/// Runs a command, prints its output, and counts the results. A command that fails without a failed test counts as a
/// failure.
pub(crate) fn stream(suite: &str, command: &mut Command, count: impl Fn(&str, &str) -> Row) -> Result<Row, String> {
    println!("\n== {suite} ==");
    let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
    let mut child = spawned.map_err(|error| format!("cannot run {command:?}: {error}"))?;
    let mut output = String::new();
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            println!("{line}");
            output.push_str(&line);
            output.push('\n');
        }
    }
    let status = child.wait().map_err(|error| format!("cannot wait for {command:?}: {error}"))?;
    let row = count(suite, &output);
    // The status is added unless a failed test explains it.
    if status.success() || row.failed > 0 && !row.did_not_end() { Ok(row) } else { Ok(row.fail(&status.to_string())) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tally::count;

    #[test]
    fn a_command_that_fails_without_a_failed_test_is_a_failure() {
        let mut command = Command::new("sh");
        let row = stream("suite", command.args(["-c", "echo 'test a ... ok'; printf 'test b ... '; exit 3"]), count);
        let row = row.unwrap();
        assert_eq!((row.passed, row.failed, row.note.as_str()), (1, 1, "did not end: b (exit status: 3)"));
        let row = stream("suite", Command::new("sh").args(["-c", "echo 'test a ... ok'; exit 3"]), count).unwrap();
        assert_eq!((row.passed, row.failed, row.note.as_str()), (1, 1, "exit status: 3"));
    }
}

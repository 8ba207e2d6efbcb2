//! Counts the results of the suites.

/// The results of suites, in the order in which they ran.
#[derive(Debug, Default)]
pub(crate) struct Tally(Vec<Row>);

/// The results of one suite.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) suite: String,
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) skipped: usize,
    /// Why tests were skipped, or why the suite failed as a whole.
    pub(crate) note: String,
}

impl Tally {
    pub(crate) fn add(&mut self, row: Row) {
        self.0.push(row);
    }

    /// Returns whether at least one test passed and none failed.
    pub(crate) fn is_good(&self) -> bool {
        let total = self.total();
        total.failed == 0 && total.passed > 0
    }

    fn total(&self) -> Row {
        self.0.iter().fold(Row::default(), |sum, row| Row {
            passed: sum.passed + row.passed,
            failed: sum.failed + row.failed,
            skipped: sum.skipped + row.skipped,
            ..sum
        })
    }

    pub(crate) fn print(&self) {
        println!();
        println!("{:<44} {:>7} {:>7} {:>8}", "suite", "passed", "failed", "skipped");
        for Row { suite, passed, failed, skipped, note } in &self.0 {
            println!("{:<44} {:>7} {:>7} {:>8}  {}", suite, passed, failed, skipped, note);
        }
        let Row { passed, failed, skipped, .. } = self.total();
        println!();
        println!("{passed} passed, {failed} failed, {skipped} skipped");
    }
}

impl Row {
    /// Records a failure of the suite as a whole. It is not counted again if it interrupted a test.
    pub(crate) fn fail(mut self, reason: &str) -> Self {
        if self.did_not_end() {
            self.note = format!("{} ({reason})", self.note);
        } else {
            self.failed += 1;
            self.note = reason.into();
        }
        self
    }

    /// Returns whether a test of the suite started and has no result.
    pub(crate) fn did_not_end(&self) -> bool {
        self.note.starts_with(DID_NOT_END)
    }
}

/// The prefix of the note about a test without a result.
const DID_NOT_END: &str = "did not end: ";

/// Counts the results in a suite's output. The harnesses of cargo, of the kernel and of the suites print lines of the
/// form `test NAME ... ok`.
pub(crate) fn count(suite: &str, output: &str) -> Row {
    let mut row = Row { suite: suite.into(), ..Row::default() };
    let mut open = None;
    for line in output.lines() {
        // The test's own output may come between its name and its result.
        if let Some((name, _)) = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... ")) {
            open = Some(name.trim());
        }
        if open.is_none() {
            continue;
        }
        match line.rsplit(" ... ").next().unwrap_or(line).trim() {
            "ok" => row.passed += 1,
            "FAILED" => row.failed += 1,
            // Another test runs it. Harnesses other than the suites' give no reason.
            "ignored" | "ignored (another test runs it)" => {}
            verdict if verdict.starts_with("ignored") => {
                row.skipped += 1;
                let reason = verdict.trim_start_matches("ignored").trim_matches([' ', ',', '(', ')']);
                row.note = format!("skipped: {reason}");
            }
            _ => continue,
        }
        open = None;
    }
    if let Some(name) = open {
        row.failed += 1;
        row.note = format!("{DID_NOT_END}{name}");
    }
    row
}

/// Counts the results in the output of a suite that must have tests.
pub(crate) fn count_suite(suite: &str, output: &str) -> Row {
    let row = count(suite, output);
    if row.passed + row.failed + row.skipped == 0 { row.fail("it ran no test") } else { row }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_are_counted() {
        let output = "running 6 tests\ntest a  ... ok\ntest b  ... some output\nok\ntest c  ... FAILED\nok\n\
                      test d ... ignored (no keys)\ntest e ... ignored\ntest f ... ignored (another test runs it)\nok\ntest result: FAILED. 2 passed";
        let row = count("suite", output);
        assert_eq!((row.passed, row.failed, row.skipped, row.note.as_str()), (2, 1, 1, "skipped: no keys"));
    }

    #[test]
    fn a_suite_that_is_killed_keeps_its_verdicts_and_names_the_test() {
        let row = count("suite", "running 3 tests\ntest a      ... ok\ntest hangs  ... a word").fail("killed");
        assert_eq!((row.passed, row.failed, row.note.as_str()), (1, 1, "did not end: hangs (killed)"));
        let row = count("suite", "running 3 tests\ntest a ... ok\n").fail("killed");
        assert_eq!((row.passed, row.failed, row.note.as_str()), (1, 1, "killed"));
    }

    #[test]
    fn a_suite_without_tests_fails() {
        assert_eq!(count_suite("suite", "running 0 tests").failed, 1);
    }

    #[test]
    fn nothing_is_not_good() {
        let mut tally = Tally::default();
        assert!(!tally.is_good());
        tally.add(Row { passed: 3, ..Row::default() });
        assert!(tally.is_good());
        tally.add(Row { passed: 3, failed: 1, ..Row::default() });
        assert!(!tally.is_good());
    }
}

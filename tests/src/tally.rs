//! What came of the suites.

/// Results of suites, in the order in which they ran.
#[derive(Debug, Default)]
pub(crate) struct Tally(Vec<Row>);

/// The results of one suite.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) suite: String,
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) skipped: usize,
    /// Why tests were skipped, or the suite as a whole failed.
    pub(crate) note: String,
}

impl Tally {
    pub(crate) fn add(&mut self, row: Row) {
        self.0.push(row);
    }

    /// Nothing failed, and something ran.
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

/// Counts what a suite printed: lines that end a test (`… ok`, `… FAILED`), as cargo's harness, the kernel's and
/// `inside` print them.
pub(crate) fn count(suite: &str, output: &str) -> Row {
    let mut row = Row { suite: suite.into(), ..Row::default() };
    let mut open = false;
    for line in output.lines() {
        // A test's own output may stand between its name and its verdict.
        open |= line.starts_with("test ") && line.contains(" ... ");
        match line.rsplit(" ... ").next().unwrap_or(line).trim() {
            "ok" if open => row.passed += 1,
            "FAILED" if open => row.failed += 1,
            verdict if open && verdict.starts_with("skipped: ") => {
                row.skipped += 1;
                row.note = verdict.into();
            }
            _ => continue,
        }
        open = false;
    }
    row
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_are_counted() {
        let output = "running 4 tests\ntest a ... ok\ntest b ... some output\nok\ntest c ... FAILED\nok\n\
                      test d ... skipped: no keys\ntest result: FAILED. 2 passed";
        let row = count("suite", output);
        assert_eq!((row.passed, row.failed, row.skipped, row.note.as_str()), (2, 1, 1, "skipped: no keys"));
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

//! Tests the harness: each test has its own process, and the command line is that of the standard harness.

use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};

use support::suite;

suite! {
    #[anywhere] a_test_that_dies_fails_alone,
    #[anywhere] a_test_whose_process_exits_fails,
    #[anywhere] tests_share_no_state,
    #[anywhere] what_a_failed_test_has_printed_is_shown,
    #[anywhere] what_a_good_test_prints_is_not_shown_unless_asked_for,
    #[anywhere] tests_are_listed_and_chosen_by_name,
    #[anywhere] a_test_without_keys_is_skipped_and_says_why,
    #[anywhere] #[on_first_thread] a_test_can_have_the_first_thread,
    #[anywhere] #[child] changes_state,
    #[anywhere] #[child] changes_state_too,
    #[anywhere] #[child] dies,
    #[anywhere] #[child] exits,
    #[anywhere] #[child] panics,
    #[child] needs_keys,
}

static WAS_CHANGED: AtomicBool = AtomicBool::new(false);

fn changes_state() {
    println!("figure: 1 change");
    println!("a word of it");
    assert!(!WAS_CHANGED.swap(true, Ordering::Relaxed));
}

fn changes_state_too() {
    changes_state();
}

fn dies() {
    std::process::abort();
}

fn exits() {
    std::process::exit(0);
}

fn panics() {
    println!("before the panic");
    panic!("in a test");
}

fn needs_keys() {
    drop(support::domain("any"));
}

/// Runs this suite again with the tests marked `child`.
fn run(arguments: &[&str], environment: &[(&str, &str)]) -> (Output, String) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.arg("--ignored").args(arguments).env_remove("PKRU_TEST_FORCE").envs(environment.iter().copied());
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    (output, text)
}

fn a_test_that_dies_fails_alone() {
    let (output, text) = run(&["--test-threads", "1", "--skip", "needs_keys", "--skip", "exits"], &[]);
    assert_eq!(output.status.code(), Some(101), "{text}");
    assert!(
        text.contains("test changes_state     ... ok") && text.contains("test dies              ... FAILED"),
        "{text}"
    );
    assert!(text.contains("2 passed; 2 failed; 0 ignored"), "{text}");
    assert!(text.contains("signal: 6 (SIGABRT)"), "{text}");
}

fn a_test_whose_process_exits_fails() {
    let (output, text) = run(&["--exact", "exits"], &[]);
    assert!(!output.status.success() && text.contains("its process ended: exit status: 0"), "{text}");
}

fn tests_share_no_state() {
    let (output, text) = run(&["changes_state"], &[]);
    assert!(output.status.success() && text.contains("2 passed"), "{text}");
}

fn what_a_failed_test_has_printed_is_shown() {
    let (_, text) = run(&["panics"], &[]);
    assert!(
        text.contains("before the panic") && text.contains("thread 'panics'") && text.contains("in a test"),
        "{text}"
    );
}

fn what_a_good_test_prints_is_not_shown_unless_asked_for() {
    let (_, text) = run(&["--exact", "changes_state"], &[]);
    assert!(text.contains("changes_state:\n    1 change\n") && !text.contains("a word"), "{text}");
    let (_, text) = run(&["--exact", "changes_state", "--nocapture"], &[]);
    assert!(text.contains("a word"), "{text}");
}

fn tests_are_listed_and_chosen_by_name() {
    let (_, text) = run(&["--list", "--format", "terse", "changes"], &[]);
    assert_eq!(text, "changes_state: test\nchanges_state_too: test\n");
    let (_, text) = run(&["--exact", "changes_state"], &[]);
    assert!(text.contains("1 passed; 0 failed; 0 ignored; 0 measured; 13 filtered out"), "{text}");
}

fn a_test_without_keys_is_skipped_and_says_why() {
    let (output, text) = run(&["needs_keys"], &[]);
    let (forced, forced_text) = run(&["needs_keys"], &[("PKRU_TEST_FORCE", "1")]);
    match pkru_userspace::capability::detect() {
        Ok(_) => assert!(text.contains("1 passed") && forced_text.contains("1 passed"), "{text}{forced_text}"),
        Err(error) => {
            assert!(output.status.success() && text.contains("needs_keys ... ignored ("), "{text}");
            assert!(text.contains(&format!("skipped: {error}")), "{text}");
            assert!(!forced.status.success() && forced_text.contains(&error.to_string()), "{forced_text}");
        }
    }
}

fn a_test_can_have_the_first_thread() {
    assert_eq!(std::fs::read_dir("/proc/self/task").unwrap().count(), 1);
}

//! Checks that the tests named in the documents exist.

use crate::build::workspace;

/// Returns the tests that a document names, written as `suite: test` in backticks.
fn tests_named_in(document: &str) -> Vec<(String, String)> {
    let is_name = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    let code = document.split('`').skip(1).step_by(2);
    let named = code
        .filter_map(|code| code.split_once(": "))
        .filter(|(suite, test)| is_name(suite) && test.split("::").all(is_name));
    named.map(|(suite, test)| (suite.into(), test.into())).collect()
}

/// Returns whether a suite has a test whose name begins with `test`. A module of a suite is a file in its folder.
fn exists(suite: &str, test: &str) -> bool {
    let (module, test) = test.rsplit_once("::").unwrap_or(("", test));
    ["userspace/tests", "tests/tests"].iter().any(|folder| {
        let suite = workspace().join(folder).join(suite);
        let file = if module.is_empty() { suite } else { suite.join(module) }.with_extension("rs");
        std::fs::read_to_string(file).is_ok_and(|text| text.contains(&format!("fn {test}")))
    })
}

#[test]
fn every_test_that_the_documents_name_exists() {
    for (document, least) in [("docs/threat-model.md", 60), ("docs/tools.md", 1)] {
        let named = tests_named_in(&std::fs::read_to_string(workspace().join(document)).unwrap());
        assert!(named.len() >= least, "only {} found in {document}", named.len());
        let missing: Vec<_> = named.iter().filter(|(suite, test)| !exists(suite, test)).collect();
        assert!(missing.is_empty(), "these tests do not exist: {missing:?}");
    }
}

#[test]
fn no_document_has_a_placeholder() {
    for document in [
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "docs/architecture.md",
        "docs/threat-model.md",
        "docs/tools.md",
        "docs/when-it-does-not-compile.md",
    ] {
        let text = std::fs::read_to_string(workspace().join(document)).unwrap();
        let found = ["FIG", "TODO", "XXX", "TBD"].into_iter().find(|placeholder| text.contains(placeholder));
        assert_eq!(found, None, "in {document}");
    }
}

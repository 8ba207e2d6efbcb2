//! Checks that the README contains the example `first_call` word for word.

#[test]
fn the_readme_shows_the_example() {
    let readme = include_str!("../../README.md");
    let example = include_str!("../examples/first_call.rs");
    let (_, code) = example.split_once("\n\n").unwrap();
    assert!(readme.contains(code), "the README's code is not examples/first_call.rs");
}

//! Results that a hostile domain forges are refused, and nothing outside it is read or freed.

mod common;

use common::{domain, works};
use pkru_userspace::transfer::InvalidResult;
use pkru_userspace::{Domain, ViolationKind};

#[test]
fn values_cross() {
    let mut domain = need!(domain("values"));
    assert_eq!(domain.call(|| ()).unwrap(), ());
    assert_eq!(domain.call(|| (1u8, -2i64, 'ß', true)).unwrap(), (1, -2, 'ß', true));
    assert_eq!(domain.call(|| Some(vec![String::from("a"), String::new()])).unwrap().unwrap(), ["a", ""]);
    assert_eq!(
        domain.call(|| "seven".parse::<u32>().map_err(|error| error.to_string())).unwrap().unwrap_err(),
        "invalid digit found in string"
    );
    assert_eq!(domain.call(|| [[1u16; 3]; 2]).unwrap(), [[1; 3]; 2]);
    assert_eq!(domain.call(Vec::<u64>::new).unwrap(), []);
    assert_eq!(domain.call(|| vec![7u64; 1 << 16]).unwrap().len(), 1 << 16);
}

fn refused<R: pkru_userspace::transfer::Transfer + std::fmt::Debug>(
    domain: &mut Domain,
    forge: impl Fn() -> R,
) -> InvalidResult {
    let violation = domain.call(forge).unwrap_err();
    works(domain);
    match violation.kind() {
        ViolationKind::InvalidResult(invalid) => *invalid,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_vector_outside_the_domain() {
    let mut domain = need!(domain("liar"));
    let secret = vec![0x42_u8; 64];
    let address = secret.as_ptr().cast_mut();
    // SAFETY: none: the vector is not the domain's.
    let invalid = refused(&mut domain, || unsafe { Vec::from_raw_parts(address, 64, 64) });
    assert_eq!(invalid, InvalidResult::OutOfBounds { address: address as u64, length: 64 });
    assert_eq!(secret, [0x42; 64], "and nothing has freed it");
}

#[test]
fn a_length_past_the_end() {
    let mut domain = need!(domain("liar"));
    // SAFETY: none: the length is a lie.
    let invalid = refused(&mut domain, || unsafe {
        let block = Vec::leak(vec![0u8; 16]).as_mut_ptr();
        Vec::from_raw_parts(block, 1 << 40, 1 << 40)
    });
    assert!(matches!(invalid, InvalidResult::OutOfBounds { .. } | InvalidResult::TooLarge), "{invalid:?}");
}

#[test]
fn text_that_is_not_utf8() {
    let mut domain = need!(domain("liar"));
    // SAFETY: none: the bytes are not UTF-8.
    let invalid = refused(&mut domain, || unsafe { String::from_utf8_unchecked(vec![0xff, 0xfe]) });
    assert_eq!(invalid, InvalidResult::NotUtf8);
}

#[test]
fn parts_that_overlap() {
    let mut domain = need!(domain("liar"));
    let invalid = refused(&mut domain, || {
        let block = Vec::leak(vec![0u64; 1 << 20]).as_mut_ptr();
        // SAFETY: none: all of them are the same block.
        (0..1000).map(|_| unsafe { Vec::from_raw_parts(block, 1 << 20, 1 << 20) }).collect::<Vec<_>>()
    });
    assert_eq!(invalid, InvalidResult::TooLarge);
}

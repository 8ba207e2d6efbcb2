//! A periodic hardware interrupt, from the 8254 timer through the 8259A interrupt controllers.
//!
//! # References
//!
//! Intel 8254 data sheet, "Control Word Format"; Intel 8259A data sheet, "Initialization Command Words".

use core::sync::atomic::{AtomicU64, Ordering};

use pkru::KeyRights;
use x86_64::instructions::interrupts;

use crate::fence::{self, Rights};
use crate::ports::{self, Register};
use crate::trap::TIMER;

static TICKS: AtomicU64 = AtomicU64::new(0);
static TICKS_IN_DOMAIN: AtomicU64 = AtomicU64::new(0);

/// Returns the number of ticks, and the number of those that interrupted a domain.
pub fn ticks() -> (u64, u64) {
    (TICKS.load(Ordering::Relaxed), TICKS_IN_DOMAIN.load(Ordering::Relaxed))
}

/// Handles a tick. `interrupted` are the rights of the code that it interrupted.
///
/// # Panics
///
/// If the handler itself runs without all rights.
pub(crate) fn tick(interrupted: Rights) {
    const END_OF_INTERRUPT: u8 = 0x20;
    let rights = fence::read();
    assert_eq!(rights, Rights { pkru: KeyRights::ALL, pkrs: KeyRights::ALL }, "a handler has all rights");
    TICKS.fetch_add(1, Ordering::Relaxed);
    if interrupted != rights {
        TICKS_IN_DOMAIN.fetch_add(1, Ordering::Relaxed);
    }
    ports::write(Register::FirstCommand, END_OF_INTERRUPT);
}

/// Starts 1,000 ticks a second and enables interrupts.
pub fn start() {
    // The timer counts down at 1,193,182 Hz.
    const DIVISOR: u16 = 1193;
    // Each controller takes four words: initialise, first vector, cascade line 2, 8086 mode.
    for (register, value) in [
        (Register::FirstCommand, 0x11),
        (Register::SecondCommand, 0x11),
        (Register::FirstData, TIMER),
        (Register::SecondData, TIMER + 8),
        (Register::FirstData, 4),
        (Register::SecondData, 2),
        (Register::FirstData, 1),
        (Register::SecondData, 1),
    ] {
        ports::write(register, value);
    }
    // Masks: only line 0, the timer, is open.
    ports::write(Register::FirstData, 0xfe);
    ports::write(Register::SecondData, 0xff);
    // Channel 0, low byte then high byte, rate generator.
    ports::write(Register::Mode, 0x34);
    for byte in DIVISOR.to_le_bytes() {
        ports::write(Register::Channel0, byte);
    }
    interrupts::enable();
}

/// Disables interrupts.
pub fn stop() {
    interrupts::disable();
}

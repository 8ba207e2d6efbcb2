//! The GDT, the TSS and the trap stacks.
//!
//! A trap never runs on the interrupted stack, because a domain's stack pointer can hold any value. With PKRS as the
//! fence, domains need write access to the trap stacks: the CPU pushes a trap's frame with the rights in force (Intel
//! SDM volume 3, "Protection Keys": PKRS applies to implicit accesses too). So the trap stacks lie on pages of their
//! own, which [`fence`](crate::fence) tags with a key of their own. Nothing on them outlives a trap.

#![expect(unsafe_code, reason = "loading a segment or task register needs a valid selector")]

use core::ops::Range;

use spin::Once;
use x86_64::VirtAddr;
use x86_64::instructions::segmentation::{CS, DS, ES, SS, Segment};
use x86_64::instructions::tables::load_tss;
use x86_64::registers::segmentation::SegmentSelector;
use x86_64::structures::gdt::{Descriptor, GlobalDescriptorTable};
use x86_64::structures::tss::TaskStateSegment;

/// The indices of the interrupt stack table.
#[derive(Debug, Clone, Copy)]
#[repr(u16)]
pub(crate) enum TrapStack {
    /// Exceptions.
    Exception,
    /// Double faults, which the CPU raises when it cannot deliver an exception, and non-maskable interrupts.
    DoubleFault,
    /// Hardware and software interrupts.
    Interrupt,
}

const COUNT: usize = 3;
const SIZE: usize = 16 * 1024;

#[repr(C, align(4096))]
struct Stacks([[u8; SIZE]; COUNT]);

static mut STACKS: Stacks = Stacks([[0; SIZE]; COUNT]);

/// Returns the addresses of the trap stacks, which are whole pages.
#[must_use]
pub fn trap_stacks() -> Range<VirtAddr> {
    let start = VirtAddr::from_ptr(&raw const STACKS);
    start..start + size_of::<Stacks>() as u64
}

/// Loads the GDT, the segment registers and the task register.
pub(crate) fn init() {
    static TSS: Once<TaskStateSegment> = Once::new();
    static GDT: Once<(GlobalDescriptorTable, [SegmentSelector; 3])> = Once::new();

    let tss = TSS.call_once(|| {
        let mut tss = TaskStateSegment::new();
        for stack in [TrapStack::Exception, TrapStack::DoubleFault, TrapStack::Interrupt] {
            let index = stack as usize;
            tss.interrupt_stack_table[index] = trap_stacks().start + ((index + 1) * SIZE) as u64;
        }
        tss
    });
    let (gdt, [code, data, task]) = GDT.call_once(|| {
        let mut gdt = GlobalDescriptorTable::new();
        let code = gdt.append(Descriptor::kernel_code_segment());
        let data = gdt.append(Descriptor::kernel_data_segment());
        let task = gdt.append(Descriptor::tss_segment(tss));
        (gdt, [code, data, task])
    });
    gdt.load();
    // SAFETY: the GDT just loaded has a 64-bit code segment there, equal to the one in use.
    unsafe { CS::set_reg(*code) };
    for set in [SS::set_reg, DS::set_reg, ES::set_reg] {
        // SAFETY: the GDT just loaded has a data segment there, and 64-bit mode ignores its base and limit.
        unsafe { set(*data) };
    }
    // SAFETY: the GDT just loaded has the descriptor of `tss` there, which is static, and no CPU has loaded it before.
    unsafe { load_tss(*task) };
}

//! GDT, TSS and the exception stacks.
//!
//! Every trap runs on a stack of its own, for it may strike in a domain whose stack pointer is anything. With PKRS as
//! the fence a domain must have write access to these stacks, because the CPU pushes a trap's frame with the rights in
//! force (Intel SDM volume 3, "Protection Keys": PKRS applies to implicit accesses too). So they lie together in pages
//! that [`fence`](crate::fence) tags with a key of their own. Nothing in them outlives a trap.

use core::ops::Range;

use spin::Once;
use x86_64::VirtAddr;
use x86_64::instructions::segmentation::{CS, DS, ES, SS, Segment};
use x86_64::instructions::tables::load_tss;
use x86_64::registers::segmentation::SegmentSelector;
use x86_64::structures::gdt::{Descriptor, GlobalDescriptorTable};
use x86_64::structures::tss::TaskStateSegment;

/// Entries of the interrupt stack table.
#[derive(Debug, Clone, Copy)]
#[repr(u16)]
pub(crate) enum TrapStack {
    /// Exceptions.
    Exception,
    /// Double faults, which strike when an exception could not be delivered.
    DoubleFault,
    /// Hardware and software interrupts.
    Interrupt,
}

const COUNT: usize = 3;
const SIZE: usize = 16 * 1024;

#[repr(C, align(4096))]
struct Stacks([[u8; SIZE]; COUNT]);

static mut STACKS: Stacks = Stacks([[0; SIZE]; COUNT]);

/// Returns the pages of the exception stacks.
#[must_use]
pub fn trap_stacks() -> Range<VirtAddr> {
    let start = VirtAddr::from_ptr(&raw const STACKS);
    start..start + size_of::<Stacks>() as u64
}

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
    // SAFETY: the selector is that of the kernel's code segment in the table just loaded.
    unsafe { CS::set_reg(*code) };
    for set in [SS::set_reg, DS::set_reg, ES::set_reg] {
        // SAFETY: the selector is that of the kernel's data segment in the table just loaded.
        unsafe { set(*data) };
    }
    // SAFETY: the selector is that of a task state segment which lives for ever, not loaded before.
    unsafe { load_tss(*task) };
}
